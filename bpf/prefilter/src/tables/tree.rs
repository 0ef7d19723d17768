//! In which order prefix lengths are tried.

use tungate_bpf_abi::MAX_LOOKUPS;

/// Up to this many lengths are tried one after another, from the longest down; more are searched.
///
/// A chain needs no markers, so that it costs no memory and an entry can be added by writing one key.
pub(crate) const CHAIN_MAX: usize = 6;

/// Stands for "no further node".
pub(crate) const NONE: u8 = u8::MAX;

/// The order in which the prefix lengths of one family are tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tree {
    nodes: Vec<TreeNode>,
}

/// One length, and where to go from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TreeNode {
    pub(crate) length: u8,
    pub(crate) on_hit: u8,
    pub(crate) on_miss: u8,
}

impl Tree {
    /// Builds the tree for `lengths`, which are distinct, ascending and not 0.
    pub(crate) fn new(lengths: &[u8]) -> Self {
        let mut tree = Self::default();
        if lengths.len() <= CHAIN_MAX {
            for (index, &length) in lengths.iter().rev().enumerate() {
                let on_miss = if index + 1 < lengths.len() {
                    index as u8 + 1
                } else {
                    NONE
                };
                tree.nodes.push(TreeNode {
                    length,
                    on_hit: NONE,
                    on_miss,
                });
            }
        } else {
            tree.halve(lengths);
        }
        tree
    }

    /// Index of the first node.
    pub(crate) fn root(&self) -> u8 {
        if self.nodes.is_empty() { NONE } else { 0 }
    }

    pub(crate) fn nodes(&self) -> &[TreeNode] {
        &self.nodes
    }

    /// Whether `length` is tried at all.
    pub(crate) fn has(&self, length: u8) -> bool {
        self.nodes.iter().any(|node| node.length == length)
    }

    /// Lengths at which the search for `length` has to be told to go on to longer ones.
    pub(crate) fn markers(&self, length: u8) -> impl Iterator<Item = u8> {
        let mut index = self.root();
        std::iter::from_fn(move || {
            while index != NONE {
                let node = self.nodes[usize::from(index)];
                if node.length == length {
                    break;
                }
                index = if length > node.length {
                    node.on_hit
                } else {
                    node.on_miss
                };
                // In a chain nothing longer is to come after a hit: no node on the way asks for a marker.
                if length > node.length {
                    return Some(node.length);
                }
            }
            None
        })
    }

    /// Most lookups an address can cost.
    pub(crate) fn depth(&self) -> usize {
        fn below(tree: &Tree, index: u8) -> usize {
            if index == NONE {
                return 0;
            }
            let node = tree.nodes[usize::from(index)];
            1 + below(tree, node.on_hit).max(below(tree, node.on_miss))
        }
        below(self, self.root())
    }

    /// Adds a balanced search over `lengths`; returns its root.
    fn halve(&mut self, lengths: &[u8]) -> u8 {
        if lengths.is_empty() {
            return NONE;
        }
        let middle = lengths.len() / 2;
        let index = self.nodes.len();
        self.nodes.push(TreeNode {
            length: lengths[middle],
            on_hit: NONE,
            on_miss: NONE,
        });
        let on_hit = self.halve(&lengths[middle + 1..]);
        let on_miss = self.halve(&lengths[..middle]);
        self.nodes[index].on_hit = on_hit;
        self.nodes[index].on_miss = on_miss;
        debug_assert!(self.depth() <= MAX_LOOKUPS);
        index as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_set_of_lengths_needs_more_lookups_than_the_program_makes() {
        for count in 0..=128u8 {
            let lengths: Vec<u8> = (129 - count..=128).collect();
            let tree = Tree::new(&lengths);
            assert_eq!(tree.nodes().len(), usize::from(count));
            assert!(tree.depth() <= MAX_LOOKUPS, "{count} lengths: {}", tree.depth());
        }
    }

    #[test]
    fn few_lengths_are_tried_from_the_longest_down_without_markers() {
        let tree = Tree::new(&[8, 16, 24, 32]);
        assert_eq!(
            tree.nodes().iter().map(|node| node.length).collect::<Vec<_>>(),
            [32, 24, 16, 8]
        );
        for length in [8, 16, 24, 32] {
            assert_eq!(tree.markers(length).count(), 0);
        }
    }

    #[test]
    fn many_lengths_are_searched_with_markers_on_the_way() {
        let lengths: Vec<u8> = (1..=32).collect();
        let tree = Tree::new(&lengths);
        for &length in &lengths {
            // Walks as the program does: a hit at its markers and at itself, a miss at all else.
            let markers: Vec<u8> = tree.markers(length).collect();
            let mut index = tree.root();
            let mut last_hit = 0;
            while index != NONE {
                let node = tree.nodes()[usize::from(index)];
                let hit = node.length == length || markers.contains(&node.length);
                if hit {
                    last_hit = node.length;
                }
                index = if hit { node.on_hit } else { node.on_miss };
            }
            assert_eq!(last_hit, length);
        }
    }
}
