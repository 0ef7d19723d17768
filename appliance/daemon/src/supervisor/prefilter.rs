//! The pre-filter on the interfaces that `[prefilter]` names, kept in step with the engine's lists.
//!
//! It is attached by links that this process holds, so it goes with it, however that ends. Where an interface does not
//! take it, or cannot take a change later, the engine alone gives the same verdicts; the log says so, and where the
//! configuration requires the pre-filter, it is a failure.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use tokio::time::{Instant, sleep_until};
use tungate_engine::policy::{ListAction, ListEntry, PolicySpec, RuleRef};
use tungate_prefilter::kernel::{Kernel, Mode, Options, Wanted};
use tungate_prefilter::{Counters, Error, Prefilter};

use crate::commands::local_addresses;
use crate::control::api::{self, PrefilterMode};
use crate::control::{Report, entry_key};
use crate::driver::{RuleCounts, unix_time};

/// How often the host's addresses and the clock on the wall are looked at.
const LOOK_TIME: Duration = Duration::from_secs(10);
/// After so many changes of single entries, lists are loaded anew: maps keep something of each until then.
const SINGLES_MAX: u32 = 4096;

/// The pre-filter on all interfaces.
pub(super) struct Prefilters {
    required: bool,
    places: Vec<Place>,
    /// What is no longer counted elsewhere: by entries that are gone, and on interfaces that are.
    past: RuleCounts,
    past_reasons: BTreeMap<&'static str, u64>,
    local: Vec<IpAddr>,
    singles: u32,
    /// When there is something to do.
    due: Instant,
}

/// An interface.
struct Place {
    told: api::Prefilter,
    /// What is attached, if anything is.
    prefilter: Option<Prefilter<Kernel>>,
}

impl Prefilters {
    /// Attaches the pre-filter with the lists of `policy`. `clients` are the interfaces whose packets are relayed.
    ///
    /// # Errors
    ///
    /// If it is required and cannot be attached.
    pub(super) fn attach(
        settings: &tungate_config::Prefilter,
        policy: &PolicySpec,
        clients: &[String],
    ) -> Result<Self> {
        let mut prefilters = Self {
            required: settings.required,
            places: Vec::new(),
            past: RuleCounts::default(),
            past_reasons: BTreeMap::new(),
            local: Vec::new(),
            singles: 0,
            due: Instant::now(),
        };
        if settings.interfaces.is_empty() {
            return Ok(prefilters);
        }
        prefilters.local = local_addresses()?;
        for interface in &settings.interfaces {
            let mut told = api::Prefilter {
                interface: interface.clone(),
                mode: PrefilterMode::None,
                why: None,
            };
            let prefilter = match attach(interface, policy, &prefilters.local) {
                Ok(prefilter) => {
                    if let Some(attached) = prefilter.backend().attached() {
                        told.mode = match attached.mode {
                            Mode::Native => PrefilterMode::Native,
                            Mode::Generic => PrefilterMode::Generic,
                        };
                        told.why.clone_from(&attached.why);
                    }
                    tracing::info!(entries = prefilter.entries().len(), "pre-filter on {told}");
                    Some(prefilter)
                }
                Err(error) if settings.required => {
                    return Err(anyhow!(error).context(format!(
                        "[prefilter] requires the pre-filter on {interface}, and it cannot be attached"
                    )));
                }
                Err(error) => {
                    told.why = Some(error.to_string());
                    tracing::warn!(
                        "no pre-filter on {interface}, so lists are looked at in userspace: {error}"
                    );
                    None
                }
            };
            if prefilter.is_some() && !clients.contains(interface) {
                tracing::warn!(
                    "{interface} is not given by --from: the pre-filter there drops what lists deny from and to anybody, \
                     answers to the appliance's own connections among them"
                );
            }
            prefilters.places.push(Place { told, prefilter });
        }
        prefilters.schedule();
        Ok(prefilters)
    }

    /// Goes over from the lists `before` to those `after`.
    ///
    /// # Errors
    ///
    /// If the pre-filter is required and the kernel does not take the lists; those before are in force then.
    pub(super) fn change(&mut self, before: &[ListEntry], after: &[ListEntry]) -> Result<()> {
        if self.attached().next().is_none() {
            return Ok(());
        }
        self.look_at_addresses();
        self.keep_counts(before, after);
        let mut single = single(before, after).filter(|_| self.singles < SINGLES_MAX);
        let now = unix_time();
        for place in 0..self.places.len() {
            let Some(prefilter) = &mut self.places[place].prefilter else {
                continue;
            };
            let changed = match &mut single {
                Some(Single::Added(entry)) => prefilter.add(entry.clone(), now).map(drop),
                Some(Single::Removed(position)) => prefilter.remove(*position).map(drop),
                None => apply(prefilter, after, now),
            };
            let Err(error) = changed else { continue };
            if self.required {
                for place in &mut self.places[..=place] {
                    if let Some(prefilter) = &mut place.prefilter {
                        apply(prefilter, before, now)
                            .context("the pre-filter cannot go back to its lists")?;
                    }
                }
                bail!("the pre-filter cannot take the lists: {error}");
            }
            self.give_up(place, &error);
        }
        self.singles = if single.is_some() { self.singles + 1 } else { 0 };
        self.schedule();
        Ok(())
    }

    /// Waits until [`Self::tick`] has something to do.
    pub(super) async fn due(&self) {
        if self.attached().next().is_none() {
            std::future::pending::<()>().await;
        }
        sleep_until(self.due).await;
    }

    /// Takes out what has expired, and takes note of changes on the host.
    pub(super) fn tick(&mut self) {
        self.look_at_addresses();
        let now = unix_time();
        for place in 0..self.places.len() {
            if let Some(prefilter) = &mut self.places[place].prefilter
                && let Err(error) = prefilter.expire(now)
            {
                self.give_up(place, &error);
            }
        }
        self.schedule();
    }

    /// Adds what there is to tell to `report`.
    pub(super) fn report(&mut self, report: &mut Report) {
        report.prefilter = self.places.iter().map(|place| place.told.clone()).collect();
        report.by_rule = self.past.clone();
        let mut reasons = self.past_reasons.clone();
        for place in &mut self.places {
            let Some((prefilter, counters)) = place.counters() else {
                continue;
            };
            add_reasons(&mut reasons, &counters);
            let entries: Vec<&ListEntry> = prefilter.entries().collect();
            for (entry, packets) in drops(&counters, &entries) {
                report.by_rule.add(entry.to_string(), packets);
            }
        }
        report.dropped = reasons
            .into_iter()
            .map(|(reason, packets)| (reason.to_owned(), packets))
            .collect();
    }

    fn attached(&self) -> impl Iterator<Item = &Prefilter<Kernel>> {
        self.places.iter().filter_map(|place| place.prefilter.as_ref())
    }

    fn schedule(&mut self) {
        let next = self.attached().filter_map(Prefilter::next_expiry).min();
        let wait = next.map_or(LOOK_TIME, |next| {
            let at = UNIX_EPOCH + Duration::from_secs(next);
            at.duration_since(SystemTime::now()).unwrap_or_default()
        });
        self.due = Instant::now() + wait.min(LOOK_TIME);
    }

    /// Packets to this host are not judged by entries for all addresses.
    fn look_at_addresses(&mut self) {
        if self.attached().next().is_none() {
            return;
        }
        let local = match local_addresses() {
            Ok(local) if local != self.local => local,
            Ok(_) => return,
            Err(error) => {
                return tracing::warn!("the pre-filter goes on with the addresses it knows: {error:#}");
            }
        };
        for place in 0..self.places.len() {
            if let Some(prefilter) = &mut self.places[place].prefilter
                && let Err(error) = prefilter.set_local(&local)
            {
                self.give_up(place, &error);
            }
        }
        self.local = local;
    }

    /// Keeps the counts of entries that go.
    fn keep_counts(&mut self, before: &[ListEntry], after: &[ListEntry]) {
        let mut counted = Vec::new();
        let before: Vec<&ListEntry> = before.iter().collect();
        for place in &mut self.places {
            if let Some((_, counters)) = place.counters() {
                counted.extend(drops(&counters, &before));
            }
        }
        if counted.is_empty() {
            return;
        }
        let kept: HashSet<_> = after.iter().map(entry_key).collect();
        for (entry, packets) in counted {
            if !kept.contains(&entry_key(entry)) {
                self.past.add(entry.to_string(), packets);
            }
        }
    }

    /// Detaches from an interface where the lists can no longer be kept as they are to be.
    fn give_up(&mut self, place: usize, error: &Error) {
        let place = &mut self.places[place];
        let interface = &place.told.interface;
        tracing::warn!("no pre-filter on {interface} any more, so lists are looked at in userspace: {error}");
        if let Some((prefilter, counters)) = place.counters() {
            add_reasons(&mut self.past_reasons, &counters);
            let entries: Vec<&ListEntry> = prefilter.entries().collect();
            for (entry, packets) in drops(&counters, &entries) {
                self.past.add(entry.to_string(), packets);
            }
        }
        place.prefilter = None;
        place.told.mode = PrefilterMode::None;
        place.told.why = Some(error.to_string());
    }
}

impl Place {
    fn counters(&mut self) -> Option<(&Prefilter<Kernel>, Counters)> {
        let prefilter = self.prefilter.as_mut()?;
        match prefilter.counters() {
            Ok(counters) => Some((prefilter, counters)),
            Err(error) => {
                tracing::warn!(
                    "the pre-filter on {} does not tell what it has counted: {error}",
                    self.told.interface
                );
                None
            }
        }
    }
}

fn attach(interface: &str, policy: &PolicySpec, local: &[IpAddr]) -> Result<Prefilter<Kernel>, Error> {
    let mut prefilter = Prefilter::load(Options::default())?;
    prefilter.set_local(local)?;
    prefilter.apply(policy, unix_time())?;
    prefilter.backend_mut().attach(interface, Wanted::Best)?;
    Ok(prefilter)
}

fn apply(prefilter: &mut Prefilter<Kernel>, lists: &[ListEntry], now: u64) -> Result<(), Error> {
    let policy = PolicySpec {
        lists: lists.to_vec(),
        ..PolicySpec::default()
    };
    prefilter.apply(&policy, now).map(drop)
}

/// A change of one entry, which takes no loading of all.
#[derive(Debug, PartialEq, Eq)]
enum Single<'a> {
    Added(&'a ListEntry),
    Removed(u32),
}

fn single<'a>(before: &[ListEntry], after: &'a [ListEntry]) -> Option<Single<'a>> {
    if let Some((last, rest)) = after.split_last()
        && rest == before
    {
        return Some(Single::Added(last));
    }
    if after.len() + 1 != before.len() {
        return None;
    }
    let position = before
        .iter()
        .zip(after)
        .take_while(|(before, after)| before == after)
        .count();
    (before[position + 1..] == after[position..]).then_some(Single::Removed(position as u32))
}

/// What entries have dropped, of those that have dropped anything.
fn drops<'a>(counters: &Counters, entries: &[&'a ListEntry]) -> Vec<(&'a ListEntry, u64)> {
    let dropped = counters.rules.iter().filter_map(|&(rule, count)| {
        let RuleRef::List(position) = rule else {
            return None;
        };
        let entry = entries.get(position as usize)?;
        (entry.action == ListAction::Deny && count.packets > 0).then_some((*entry, count.packets))
    });
    dropped.collect()
}

fn add_reasons(reasons: &mut BTreeMap<&'static str, u64>, counters: &Counters) {
    for (reason, count) in counters.reasons.iter().filter(|(reason, _)| reason.is_drop()) {
        *reasons.entry(reason.name()).or_default() += count.packets;
    }
}

#[cfg(test)]
mod tests {
    use tungate_config::parse_list;

    use super::*;

    #[test]
    fn changes_of_one_entry_are_told_from_others() {
        let lists = |lines: &[u8]| {
            let text: Vec<String> = lines.iter().map(|line| format!("deny 192.0.2.{line}")).collect();
            parse_list(text.join("\n").as_bytes(), "test").unwrap().entries
        };
        let is = |before: &[u8], after: &[u8], expected: Option<Single<'_>>| {
            let (before, after) = (lists(before), lists(after));
            assert_eq!(single(&before, &after), expected, "{before:?} {after:?}");
        };
        let three = &lists(&[3])[0];
        is(&[1, 2], &[1, 2, 3], Some(Single::Added(three)));
        is(&[], &[3], Some(Single::Added(three)));
        is(&[1, 2, 3], &[1, 3], Some(Single::Removed(1)));
        is(&[1, 2, 3], &[1, 2], Some(Single::Removed(2)));
        is(&[1], &[], Some(Single::Removed(0)));
        is(&[1, 2], &[1, 2], None);
        is(&[1, 2], &[2, 1], None);
        is(&[1, 2, 3], &[4, 3], None);
        is(&[1, 2], &[3, 1, 2], None);
    }
}
