//! Names of what decided, looked up once per rule and not once per packet.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tungate_engine::policy::{Policy, RuleRef};

/// A name in a [`RuleNames`]; equal names have equal ids, also when several policies use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RuleId(pub(super) u32);

/// The names of the rules that have decided something, each with the number of packets.
#[derive(Debug, Default)]
pub(super) struct RuleNames {
    names: Vec<String>,
    packets: Vec<u64>,
    by_name: HashMap<String, RuleId>,
    /// Keyed by the policy's address: compared, never followed, and kept from reuse by `policies`.
    by_rule: HashMap<(usize, RuleRef), RuleId>,
    policies: Vec<Arc<Policy>>,
    latest: Option<(usize, RuleRef, RuleId)>,
}

impl RuleNames {
    /// The id of a rule's name.
    pub(super) fn id(&mut self, policy: &Arc<Policy>, rule: RuleRef) -> RuleId {
        let address = Arc::as_ptr(policy).addr();
        match self.latest {
            Some((latest_policy, latest_rule, id)) if latest_policy == address && latest_rule == rule => {
                return id;
            }
            Some(_) | None => {}
        }
        let id = match self.by_rule.get(&(address, rule)) {
            Some(&id) => id,
            None => {
                if !self.policies.iter().any(|known| Arc::ptr_eq(known, policy)) {
                    self.policies.push(Arc::clone(policy));
                }
                let id = self.intern(policy.name(rule).to_string());
                self.by_rule.insert((address, rule), id);
                id
            }
        };
        self.latest = Some((address, rule, id));
        id
    }

    /// Counts a packet that `id` decided.
    pub(super) fn count(&mut self, id: RuleId) {
        self.packets[id.0 as usize] += 1;
    }

    /// The name of `id`.
    pub(super) fn name(&self, id: RuleId) -> &str {
        &self.names[id.0 as usize]
    }

    /// The packets of each name that has any.
    pub(super) fn packets(&self) -> BTreeMap<String, u64> {
        let counted = self
            .names
            .iter()
            .zip(&self.packets)
            .filter(|&(_, &packets)| packets > 0);
        counted.map(|(name, &packets)| (name.clone(), packets)).collect()
    }

    fn intern(&mut self, name: String) -> RuleId {
        if let Some(&id) = self.by_name.get(&name) {
            return id;
        }
        let id = RuleId(self.names.len() as u32);
        self.by_name.insert(name.clone(), id);
        self.names.push(name);
        self.packets.push(0);
        id
    }
}

#[cfg(test)]
mod tests {
    use tungate_engine::policy::{Action, PolicySpec, Rule, RuleMatch};

    use super::*;

    fn policy(names: &[&str]) -> Arc<Policy> {
        let rule = |name: &&str| Rule {
            name: (*name).to_owned(),
            matches: RuleMatch::default(),
            action: Action::Drop,
        };
        let rules = names.iter().map(rule).collect();
        Arc::new(Policy::new(PolicySpec {
            rules,
            ..PolicySpec::default()
        }))
    }

    #[test]
    fn one_name_in_two_policies_is_counted_together() {
        let (before, after) = (policy(&["ads", "games"]), policy(&["games"]));
        let mut names = RuleNames::default();
        for (policy, rule) in [
            (&before, RuleRef::Rule(1)),
            (&after, RuleRef::Rule(0)),
            (&before, RuleRef::Default),
            (&before, RuleRef::Rule(1)),
        ] {
            let id = names.id(policy, rule);
            names.count(id);
        }
        let expected = [("default".to_owned(), 1), ("games".to_owned(), 3)];
        assert_eq!(names.packets(), BTreeMap::from(expected));
    }

    #[test]
    fn a_name_that_decided_no_packet_is_not_listed() {
        let mut names = RuleNames::default();
        let id = names.id(&policy(&["ads"]), RuleRef::Rule(0));
        assert_eq!(names.name(id), "ads");
        assert!(names.packets().is_empty());
    }
}
