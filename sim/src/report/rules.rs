//! Names of what decided, looked up once per rule and not once per packet.

use std::collections::HashMap;
use std::sync::Arc;

use tungate_engine::policy::{Policy, RuleRef};

/// A name in a [`RuleNames`]; equal names have equal ids, also when several policies use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RuleId(pub(super) u32);

/// The names of the rules that have decided something.
#[derive(Debug, Default)]
pub(super) struct RuleNames {
    names: Vec<String>,
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

    /// The name of `id`.
    pub(super) fn name(&self, id: RuleId) -> &str {
        &self.names[id.0 as usize]
    }

    fn intern(&mut self, name: String) -> RuleId {
        if let Some(&id) = self.by_name.get(&name) {
            return id;
        }
        let id = RuleId(self.names.len() as u32);
        self.by_name.insert(name.clone(), id);
        self.names.push(name);
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
    fn one_name_in_two_policies_has_one_id() {
        let (before, after) = (policy(&["ads", "games"]), policy(&["games"]));
        let mut names = RuleNames::default();
        let games = names.id(&before, RuleRef::Rule(1));
        let ads = names.id(&before, RuleRef::Rule(0));
        assert_eq!(names.id(&after, RuleRef::Rule(0)), games);
        assert_eq!(names.id(&before, RuleRef::Rule(1)), games);
        assert_eq!((names.name(games), names.name(ads)), ("games", "ads"));
    }
}
