//! The lists of a running appliance, and how they change. Supervisor and worker each make every change, to the same end.

use std::collections::{HashMap, HashSet};
use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol, PortRange};

use super::api::Changed;

/// List entries in force: those of the configuration first, then those that have come by the control socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lists {
    pub(crate) entries: Vec<ListEntry>,
    /// How many of the last ones have come by the control socket.
    pub(crate) added: usize,
}

/// A change of lists, made as a whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ListChange {
    pub(crate) what: What,
    /// Seconds since the Unix epoch: what has expired then does not count.
    pub(crate) at: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum What {
    /// Add entries; one that is there gets the end of the new one.
    Add(Vec<ListEntry>),
    /// Remove entries, all of which must be there.
    Remove(Vec<ListEntry>),
    /// Have these and no others.
    Replace(Vec<ListEntry>),
}

/// Entries of a change that its line in the log names.
const NAMED: usize = 4;

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, entries) = match self {
            Self::Add(entries) => ("add", entries),
            Self::Remove(entries) => ("remove", entries),
            Self::Replace(entries) => ("replace all by", entries),
        };
        f.write_str(verb)?;
        for (place, entry) in entries.iter().take(NAMED).enumerate() {
            write!(f, "{} {entry}", if place > 0 { "," } else { "" })?;
        }
        match entries.len().saturating_sub(NAMED) {
            0 if entries.is_empty() => f.write_str(" nothing"),
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// What two entries that differ in their end alone have in common.
pub(crate) type EntryKey = (ListAction, IpNet, ListProtocol, Option<PortRange>);

pub(crate) fn entry_key(entry: &ListEntry) -> EntryKey {
    (entry.action, entry.network, entry.protocol, entry.ports)
}

impl Lists {
    /// Makes a change.
    ///
    /// # Errors
    ///
    /// Those entries to be removed that are not there; nothing has changed then.
    pub(crate) fn change(&mut self, change: &ListChange) -> Result<Changed, Vec<ListEntry>> {
        let mut changed = Changed::default();
        match &change.what {
            What::Add(entries) => {
                self.forget_expired(change.at);
                self.add(entries, &mut changed);
            }
            What::Remove(entries) => {
                let in_force = |entry: &ListEntry| entry.expires.is_none_or(|expires| expires > change.at);
                let mut missing: HashMap<_, _> =
                    entries.iter().map(|entry| (entry_key(entry), entry)).collect();
                for entry in self.entries.iter().filter(|entry| in_force(entry)) {
                    missing.remove(&entry_key(entry));
                }
                if !missing.is_empty() {
                    let is_missing = |entry: &&ListEntry| missing.contains_key(&entry_key(entry));
                    return Err(entries.iter().filter(is_missing).cloned().collect());
                }
                self.forget_expired(change.at);
                let keys: HashSet<_> = entries.iter().map(entry_key).collect();
                changed.removed = self.retain(|entry| !keys.contains(&entry_key(entry)));
            }
            What::Replace(entries) => {
                changed.removed = self.entries.len();
                *self = Self::default();
                self.add(entries, &mut changed);
            }
        }
        changed.total = self.entries.len();
        Ok(changed)
    }

    /// The lists when `configured` is what the configuration says now: what has come by the control socket stays, unless
    /// it has expired `at` seconds since the Unix epoch or stands in the configuration.
    pub(crate) fn reload(&self, configured: Vec<ListEntry>, at: u64) -> Self {
        let mut kept = self.entries[self.entries.len() - self.added..].to_vec();
        kept.retain(|entry| entry.expires.is_none_or(|expires| expires > at));
        if !kept.is_empty() {
            let keys: HashSet<_> = configured.iter().map(entry_key).collect();
            kept.retain(|entry| !keys.contains(&entry_key(entry)));
        }
        let added = kept.len();
        let mut entries = configured;
        entries.append(&mut kept);
        Self { entries, added }
    }

    fn add(&mut self, entries: &[ListEntry], changed: &mut Changed) {
        // The last word on an entry counts.
        let mut wanted: HashMap<_, _> = entries.iter().map(|entry| (entry_key(entry), entry)).collect();
        let denies: HashSet<_> = entries.iter().map(entry_key).collect();
        let denied = |key: &EntryKey| (ListAction::Deny, key.1, key.2, key.3);
        let allows: HashSet<_> = wanted
            .keys()
            .filter(|key| key.0 == ListAction::Allow)
            .map(denied)
            .collect();
        let mut shadowing: Vec<_> = allows.intersection(&denies).copied().collect();
        for entry in &mut self.entries {
            let key = entry_key(entry);
            if let Some(new) = wanted.remove(&key) {
                entry.expires = new.expires;
                changed.renewed += 1;
            }
            if allows.contains(&key) && !denies.contains(&key) {
                shadowing.push(key);
            }
        }
        for entry in entries {
            if let Some(new) = wanted.remove(&entry_key(entry)) {
                self.entries.push(new.clone());
                self.added += 1;
                changed.added += 1;
            }
        }
        let warnings = shadowing.iter().map(|&(action, network, protocol, ports)| {
            let entry = |action| ListEntry {
                action,
                network,
                protocol,
                ports,
                expires: None,
            };
            let (allow, deny) = (entry(ListAction::Allow), entry(action));
            format!("`{allow}` changes nothing as long as `{deny}` is there: of two alike, deny wins")
        });
        changed.warnings.extend(warnings);
    }

    fn forget_expired(&mut self, at: u64) {
        if self.entries.iter().any(|entry| entry.expires.is_some()) {
            self.retain(|entry| entry.expires.is_none_or(|expires| expires > at));
        }
    }

    /// Keeps only what `keep` says, and returns how many went.
    fn retain(&mut self, keep: impl Fn(&ListEntry) -> bool) -> usize {
        let before = self.entries.len();
        let configured = before - self.added;
        let mut place = 0;
        let mut added = 0;
        self.entries.retain(|entry| {
            let kept = keep(entry);
            added += usize::from(kept && place >= configured);
            place += 1;
            kept
        });
        self.added = added;
        before - self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use tungate_config::parse_list;

    use super::*;

    fn entries(lines: &str) -> Vec<ListEntry> {
        parse_list(lines.replace(';', "\n").as_bytes(), "test")
            .unwrap()
            .entries
    }

    fn until(expires: u64, lines: &str) -> Vec<ListEntry> {
        let mut entries = entries(lines);
        for entry in &mut entries {
            entry.expires = Some(expires);
        }
        entries
    }

    fn lists(configured: &str) -> Lists {
        Lists {
            entries: entries(configured),
            added: 0,
        }
    }

    fn change(lists: &mut Lists, at: u64, what: What) -> Result<Changed, Vec<ListEntry>> {
        lists.change(&ListChange { what, at })
    }

    fn shown(lists: &Lists) -> Vec<String> {
        lists.entries.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_entry_that_is_there_gets_another_end_and_no_double() {
        let mut lists = lists("deny 192.0.2.0/24");
        let added = change(
            &mut lists,
            0,
            What::Add(until(90, "deny 192.0.2.0/24;deny 10.0.0.1;deny 10.0.0.1")),
        );
        let added = added.unwrap();
        assert_eq!((added.added, added.renewed, added.total), (1, 1, 2));
        assert_eq!(lists.added, 1);
        assert!(lists.entries.iter().all(|entry| entry.expires == Some(90)));
    }

    #[test]
    fn the_log_names_what_there_is_little_of() {
        let shown = |what: What| what.to_string();
        assert_eq!(
            shown(What::Add(entries("deny 10.0.0.1;allow 10.0.0.0/8 tcp 80"))),
            "add deny 10.0.0.1/32, allow 10.0.0.0/8 tcp 80"
        );
        assert_eq!(shown(What::Replace(Vec::new())), "replace all by nothing");
        let many: Vec<_> = (0..9).map(|number| format!("deny 10.0.0.{number}")).collect();
        assert!(shown(What::Remove(entries(&many.join(";")))).ends_with(", deny 10.0.0.3/32 and 5 more"));
    }

    #[test]
    fn removal_is_of_all_or_of_nothing() {
        let mut lists = lists("deny 192.0.2.0/24;deny 10.0.0.1");
        let before = lists.clone();
        let missing = change(
            &mut lists,
            0,
            What::Remove(entries("deny 10.0.0.1;allow 10.0.0.1;deny 10.0.0.1 tcp 80")),
        );
        assert_eq!(
            missing.unwrap_err(),
            entries("allow 10.0.0.1;deny 10.0.0.1 tcp 80")
        );
        assert_eq!(lists, before);
        let removed = change(&mut lists, 0, What::Remove(entries("deny 10.0.0.1"))).unwrap();
        assert_eq!((removed.removed, removed.total), (1, 1));
    }

    #[test]
    fn what_has_expired_is_not_there() {
        let mut lists = Lists::default();
        change(&mut lists, 0, What::Add(until(10, "deny 10.0.0.1"))).unwrap();
        assert!(change(&mut lists, 10, What::Remove(entries("deny 10.0.0.1"))).is_err());
        let again = change(&mut lists, 10, What::Add(entries("deny 10.0.0.1"))).unwrap();
        assert_eq!((again.added, again.renewed), (1, 0));
    }

    #[test]
    fn a_reload_keeps_what_came_by_the_socket_and_brings_the_configured_back() {
        let mut lists = lists("deny 192.0.2.1;deny 192.0.2.2");
        change(&mut lists, 0, What::Add(entries("deny 10.0.0.1;deny 10.0.0.2"))).unwrap();
        change(&mut lists, 0, What::Add(until(50, "deny 10.0.0.3"))).unwrap();
        change(
            &mut lists,
            0,
            What::Remove(entries("deny 192.0.2.1;deny 10.0.0.2")),
        )
        .unwrap();
        let after = lists.reload(entries("deny 192.0.2.1;deny 192.0.2.3"), 50);
        assert_eq!(
            shown(&after),
            ["deny 192.0.2.1/32", "deny 192.0.2.3/32", "deny 10.0.0.1/32"]
        );
        assert_eq!(after.added, 1);
    }

    #[test]
    fn an_entry_that_cannot_do_anything_is_told_of() {
        let mut lists = lists("deny 10.0.0.1 tcp 80");
        let of = |changed: Changed| changed.warnings.len();
        assert_eq!(
            of(change(&mut lists, 0, What::Add(entries("allow 10.0.0.1"))).unwrap()),
            0
        );
        let useless = change(&mut lists, 0, What::Add(entries("allow 10.0.0.1 tcp 80"))).unwrap();
        assert!(
            useless.warnings[0].starts_with("`allow 10.0.0.1/32 tcp 80` changes nothing"),
            "{useless:?}"
        );
        let both = entries("allow 10.0.0.9;deny 10.0.0.9");
        assert_eq!(of(change(&mut lists, 0, What::Replace(both)).unwrap()), 1);
    }
}
