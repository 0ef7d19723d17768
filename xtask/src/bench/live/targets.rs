//! What is to be reached, and whether it is.

use std::fmt::Write;

use super::Results;
use super::contender::Contender;
use super::report::{FIGURES, Figure};
use super::scenario::Scenario;

struct Target {
    scenario: Scenario,
    workload: &'static str,
    figure: &'static str,
    bound: Bound,
}

/// What a figure is held against, as a factor of something else measured or by itself.
#[derive(Clone, Copy)]
enum Bound {
    Fixed(f64),
    /// Another contender's figure.
    Of(f64, Contender),
    /// tungate's figure of another workload.
    OfWorkload(f64, &'static str),
    /// tungate's figure in another scenario.
    OfScenario(f64, Scenario),
}

const fn router(workload: &'static str, figure: &'static str, bound: Bound) -> Target {
    target(Scenario::Router, workload, figure, bound)
}

const fn target(scenario: Scenario, workload: &'static str, figure: &'static str, bound: Bound) -> Target {
    Target {
        scenario,
        workload,
        figure,
        bound,
    }
}

const TARGETS: &[Target] = &[
    router("tcp-up-1", "gbit_per_s", Bound::Of(0.9, Contender::Relay)),
    router("tcp-down-1", "gbit_per_s", Bound::Of(0.9, Contender::Relay)),
    router("tcp-up-8", "gbit_per_s", Bound::Of(0.8, Contender::Relay)),
    router("tcp-down-8", "gbit_per_s", Bound::Of(0.8, Contender::Relay)),
    router("tcp-up-1", "proxy_s_per_gb", Bound::Fixed(0.5)),
    router("tcp-down-1", "proxy_s_per_gb", Bound::Fixed(0.5)),
    router("tcp-up-8", "proxy_s_per_gb", Bound::Fixed(0.5)),
    router("tcp-down-8", "proxy_s_per_gb", Bound::Fixed(0.5)),
    router("tcp-up-512", "gbit_per_s", Bound::OfWorkload(0.8, "tcp-up-8")),
    router("tcp-down-512", "gbit_per_s", Bound::OfWorkload(0.8, "tcp-down-8")),
    router("tcp-up-512", "jain", Bound::Fixed(0.9)),
    router("tcp-down-512", "jain", Bound::Fixed(0.9)),
    router("tcp-up-512", "failed", Bound::Fixed(0.0)),
    router("tcp-down-512", "failed", Bound::Fixed(0.0)),
    router("connect", "per_s", Bound::Of(0.9, Contender::Relay)),
    router("http-keep", "per_s", Bound::Of(1.0, Contender::Relay)),
    router("udp-64-up", "per_s", Bound::Fixed(180_000.0)),
    router("udp-64-down", "per_s", Bound::Fixed(180_000.0)),
    router("latency-idle", "p50_us", Bound::Of(1.2, Contender::Relay)),
    router("latency-idle", "p99_us", Bound::Of(1.2, Contender::Relay)),
    router("latency-up", "p50_us", Bound::Fixed(180.0)),
    router("latency-down", "p50_us", Bound::Fixed(180.0)),
    router("hold", "kb_each", Bound::Fixed(4.0)),
    router("hold", "answered_again", Bound::Fixed(10_000.0)),
    local("tcp-up-1", "gbit_per_s", 1.2),
    local("tcp-down-1", "gbit_per_s", 1.2),
    local("tcp-up-8", "gbit_per_s", 1.2),
    local("tcp-down-8", "gbit_per_s", 1.2),
    local("latency-idle", "p50_us", 1.0),
    local("latency-idle", "p99_us", 1.0),
    socks("tcp-up-1"),
    socks("tcp-down-1"),
    socks("tcp-up-8"),
    socks("tcp-down-8"),
];

/// Against pasta, where the client is local.
const fn local(workload: &'static str, figure: &'static str, factor: f64) -> Target {
    target(
        Scenario::Local,
        workload,
        figure,
        Bound::Of(factor, Contender::Pasta),
    )
}

/// Through a proxy against direct.
const fn socks(workload: &'static str) -> Target {
    let bound = Bound::OfScenario(0.8, Scenario::Router);
    target(Scenario::RouterSocks, workload, "gbit_per_s", bound)
}

pub(super) fn write(text: &mut String, results: &Results) {
    let rows: Vec<_> = TARGETS.iter().filter_map(|target| target.row(results)).collect();
    if !rows.is_empty() {
        let _ = writeln!(
            text,
            "## Targets\n\n| figure | to reach | measured | |\n|---|---|---|---|"
        );
        let _ = writeln!(text, "{}\n", rows.join("\n"));
    }
}

impl Target {
    /// Its row; `None` where anything that it takes was not measured.
    fn row(&self, results: &Results) -> Option<String> {
        let figure = FIGURES.iter().find(|figure| figure.name == self.figure)?;
        let ours = |scenario, workload| results.median(scenario, Contender::Tungate, workload, self.figure);
        let measured = ours(self.scenario, self.workload)?;
        let (bound, why) = match self.bound {
            Bound::Fixed(bound) => (bound, String::new()),
            Bound::Of(factor, contender) => {
                let other = results.median(self.scenario, contender, self.workload, self.figure)?;
                (factor * other, format!(", {factor} of {}'s", contender.name()))
            }
            Bound::OfWorkload(factor, workload) => {
                let other = ours(self.scenario, workload)?;
                (factor * other, format!(", {factor} of {workload}"))
            }
            Bound::OfScenario(factor, scenario) => {
                let other = ours(scenario, self.workload)?;
                (factor * other, format!(", {factor} of {}", scenario.name()))
            }
        };
        let word = if figure.reaches(measured, bound) {
            "reached"
        } else {
            "MISSED"
        };
        let (sign, digits) = (if figure.more { '≥' } else { '≤' }, figure.digits);
        Some(format!(
            "| {} {}: {} | {sign} {bound:.digits$}{why} | {measured:.digits$} | {word} |",
            self.scenario.name(),
            self.workload,
            figure.says,
        ))
    }
}

impl Figure {
    fn reaches(&self, measured: f64, bound: f64) -> bool {
        if self.more {
            measured >= bound
        } else {
            measured <= bound
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::workload::WORKLOADS;
    use super::*;

    #[test]
    fn targets_name_workloads_and_figures_that_exist() {
        for target in TARGETS {
            assert!(WORKLOADS.iter().any(|workload| workload.name == target.workload));
            assert!(FIGURES.iter().any(|figure| figure.name == target.figure));
        }
    }

    #[test]
    fn more_is_not_always_better() {
        let named = |name| FIGURES.iter().find(|figure| figure.name == name).unwrap();
        assert!(named("per_s").reaches(2.0, 1.0));
        assert!(!named("p50_us").reaches(2.0, 1.0));
    }
}
