//! Changes in a running appliance: of its lists by the control socket, of its whole policy by that or by a signal.
//!
//! They are made one after the other. A change is first made sure of, then made in the pre-filter, then in the engine,
//! and told of when it is in force in all shards. Whatever a packet meets in between, it passes only where the lists
//! before the change let it pass or those behind it do; what both say of it holds all the time.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use sd_notify::NotifyState;
use tokio::time::timeout;
use tungate_config::Loaded;

use super::{DRAIN_TIME, Lasting, Running, marks, monotonic, notify};
use crate::commands::{Rendered, configuration};
use crate::control::api::{Changed, ErrorKind, Reloaded};
use crate::control::{Ask, Done, ListChange, Refused, Report};
use crate::driver::unix_time;
use crate::egress::read_passwords;
use crate::host::HostSetup;
use crate::link::{News, Order, Ways};

/// How long the worker may take to put a policy into force: proxies' names are looked up.
const REPLACE_TIME: Duration = Duration::from_secs(60);

impl Running<'_> {
    /// Does what somebody has asked for over the control socket, and says so. If it is the end, returns how long open
    /// flows may go on.
    ///
    /// # Errors
    ///
    /// If the worker fails.
    pub(super) async fn answer(
        &mut self,
        number: u64,
        ask: Ask,
        setup: &mut HostSetup,
    ) -> Result<Option<Duration>> {
        let mut end = None;
        let answer = match ask {
            Ask::Report => Ok(Done::Report(self.report())),
            Ask::Change(change) => self.change(change).await?.map(Done::Changed),
            Ask::Reload => self.reload(setup).await.map(Done::Reloaded).map_err(|error| {
                let message = match error.downcast_ref::<Rendered>() {
                    Some(mistakes) => mistakes.plain(),
                    None => format!("{error:#}"),
                };
                Refused::new(ErrorKind::Configuration, message)
            }),
            Ask::Drain { seconds } => {
                let time = seconds.map_or(DRAIN_TIME, Duration::from_secs);
                end = Some(time);
                Ok(Done::Draining {
                    seconds: time.as_secs(),
                })
            }
        };
        self.worker.tell(&Order::Answer(number, answer)).await?;
        Ok(end)
    }

    /// The same once the end has been asked for.
    ///
    /// # Errors
    ///
    /// If the worker fails.
    pub(super) async fn answer_while_draining(&mut self, number: u64, ask: Ask) -> Result<()> {
        let answer = match ask {
            Ask::Report => Ok(Done::Report(self.report())),
            Ask::Change(_) | Ask::Reload | Ask::Drain { .. } => Err(Refused::new(
                ErrorKind::Draining,
                "the appliance is ending: it takes no changes",
            )),
        };
        self.worker.tell(&Order::Answer(number, answer)).await
    }

    /// Reads the configuration again. If anything is wrong with it, the old policy stays.
    pub(super) async fn reload_by_signal(&mut self, setup: &mut HostSetup) {
        let _ = self.reload(setup).await; // it has said what is wrong
    }

    /// Reads the configuration again, and says what came of it.
    ///
    /// # Errors
    ///
    /// What is wrong with it. The old policy stays then.
    async fn reload(&mut self, setup: &mut HostSetup) -> Result<Reloaded> {
        notify(&[NotifyState::Reloading, monotonic()]);
        let result = self.try_reload(setup).await;
        match &result {
            Ok(reloaded) => tracing::info!(
                lists = reloaded.list_entries,
                rules = reloaded.rules,
                "the policy has been replaced"
            ),
            Err(error) => {
                tracing::error!("the configuration is not used, and the policy stays as it was:\n{error:#}");
            }
        }
        notify(&[NotifyState::Ready]);
        result
    }

    async fn try_reload(&mut self, setup: &mut HostSetup) -> Result<Reloaded> {
        let Some(path) = self.configuration else {
            bail!("this appliance runs without a configuration file: start it with --config");
        };
        let Loaded {
            mut policy,
            mut engine,
            mut egresses,
            prefilter,
            control,
            sources: _,
            warnings,
        } = configuration(Some(path))?;
        let mut warnings: Vec<String> = warnings.iter().map(|warning| warning.render(false)).collect();
        engine.clients = self.settings.engine.clients;
        let settings = Lasting {
            engine,
            prefilter,
            control,
        };
        if settings != self.settings {
            let lasting = "other settings than lists, rules and egresses take effect at the next start";
            tracing::warn!("{lasting}");
            warnings.push(lasting.to_owned());
        }
        read_passwords(&mut egresses)?;
        let lists = self.lists.reload(std::mem::take(&mut policy.lists), unix_time());
        policy.lists.clone_from(&lists.entries);
        let reloaded = Reloaded {
            list_entries: lists.entries.len(),
            kept_entries: lists.added,
            rules: policy.rules.len(),
            warnings,
        };
        let marks = marks(&egresses);
        setup.make(self.capture.rules_of_marks(&marks)).await?;
        self.prefilters.change(&self.lists.entries, &lists.entries)?;
        self.allowed.add(&egresses);
        let order = Order::Replace(Ways {
            policy,
            added: lists.added,
            egresses,
        });
        self.worker.tell(&order).await?;
        self.replaced().await?;
        self.lists = lists;
        if let Order::Replace(ways) = order {
            self.allowed.keep_only(&ways.egresses);
        }
        let old = std::mem::replace(&mut self.capture.marks, marks);
        setup.take_back(&self.capture.rules_of_marks(&old)).await?;
        Ok(reloaded)
    }

    /// Changes the lists.
    ///
    /// # Errors
    ///
    /// If the worker fails.
    async fn change(&mut self, change: ListChange) -> Result<Result<Changed, Refused>> {
        let mut lists = self.lists.clone();
        let changed = match lists.change(&change) {
            Ok(changed) => changed,
            Err(missing) => return Ok(Err(Refused::no_entries(&missing))),
        };
        if let Err(error) = self.prefilters.change(&self.lists.entries, &lists.entries) {
            tracing::error!("the lists stay as they were: {error:#}");
            return Ok(Err(Refused::new(ErrorKind::Failed, format!("{error:#}"))));
        }
        self.worker.tell(&Order::Change(change)).await?;
        self.replaced().await?;
        self.lists = lists;
        Ok(Ok(changed))
    }

    /// Waits until the worker has replaced its policy.
    async fn replaced(&mut self) -> Result<()> {
        let replaced = async {
            loop {
                match self.worker.next().await? {
                    News::Replaced => return Ok(()),
                    news => self.take_note(news),
                }
            }
        };
        timeout(REPLACE_TIME, replaced)
            .await
            .context("the relaying process does not answer")?
    }

    fn report(&mut self) -> Report {
        let mut report = Report {
            configuration: self.configuration.map(|path| path.display().to_string()),
            ..Report::default()
        };
        self.prefilters.report(&mut report);
        report
    }
}
