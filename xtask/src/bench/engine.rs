//! `cargo xtask bench engine`: runs the cases of the engine's benchmark, one process each.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::{Machine, Options, Samples, grouped, write_json};
use crate::workspace::Workspace;

const FLOWS: [u32; 4] = [1, 100, 10_000, 100_000];

/// Payload bytes per packet from clients; the last is the most that fits an IPv4 packet.
const RECEIVED: [u32; 3] = [60, 1460, 65_495];

/// Payload bytes per write; the last is the largest super-packet of whole segments.
const TRANSMITTED: [u32; 3] = [60, 1460, 44 * 1460];

/// Flows enough to make what one costs stand out from what a process costs.
const MANY: u32 = 100_000;

/// More flows than the default limits allow.
const CROWD: u32 = 1_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "case", rename_all = "lowercase")]
enum Case {
    Receive {
        flows: u32,
        payload: u32,
        checksum: Checksum,
    },
    Transmit {
        flows: u32,
        payload: u32,
    },
    Open {
        flows: u32,
    },
    Memory {
        flows: u32,
    },
    Crowd {
        flows: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Checksum {
    Trusted,
    Unverified,
}

#[derive(Serialize)]
struct Results {
    machine: Machine,
    cases: Vec<CaseResults>,
}

#[derive(Serialize)]
struct CaseResults {
    #[serde(flatten)]
    case: Case,
    runs: Samples,
}

pub(super) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let program =
        workspace.executable(&["bench", "--package=tungate-engine", "--bench=engine", "--no-run"])?;
    let mut results = Results {
        machine: Machine::describe(),
        cases: cases()
            .map(|case| CaseResults {
                case,
                runs: Samples::default(),
            })
            .collect(),
    };
    let total = results.cases.len();
    for run in 1..=options.runs {
        for (at, CaseResults { case, runs }) in results.cases.iter_mut().enumerate() {
            eprint!("\rrun {run} of {}, case {} of {total} ", options.runs, at + 1);
            case.measure(&program, runs)?;
        }
    }
    eprintln!();
    results.print();
    write_json(workspace, "engine.json", &results)
}

fn cases() -> impl Iterator<Item = Case> {
    let receive = FLOWS.into_iter().flat_map(|flows| {
        RECEIVED.into_iter().flat_map(move |payload| {
            let case = move |checksum| Case::Receive {
                flows,
                payload,
                checksum,
            };
            [Checksum::Trusted, Checksum::Unverified].map(case)
        })
    });
    let transmit = FLOWS
        .into_iter()
        .flat_map(|flows| TRANSMITTED.map(|payload| Case::Transmit { flows, payload }));
    let rest = [
        Case::Open { flows: MANY },
        Case::Memory { flows: MANY },
        Case::Crowd { flows: CROWD },
    ];
    receive.chain(transmit).chain(rest)
}

impl Case {
    fn measure(self, program: &Path, runs: &mut Samples) -> Result<()> {
        let arguments = self.arguments();
        let what = || format!("{} {}", program.display(), arguments.join(" "));
        let output = Command::new(program)
            .args(&arguments)
            .output()
            .with_context(what)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}\n{errors}", what(), output.status);
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let figure = line
                .split_once(' ')
                .and_then(|(name, figure)| Some((name, figure.parse().ok()?)));
            let (name, figure) = figure.with_context(|| format!("{} printed {line:?}", what()))?;
            runs.add(name, figure);
        }
        Ok(())
    }

    fn arguments(self) -> Vec<String> {
        match self {
            Self::Receive {
                flows,
                payload,
                checksum,
            } => {
                let checksum = match checksum {
                    Checksum::Trusted => "trusted",
                    Checksum::Unverified => "unverified",
                };
                vec![
                    "receive".into(),
                    flows.to_string(),
                    payload.to_string(),
                    checksum.into(),
                ]
            }
            Self::Transmit { flows, payload } => {
                vec!["transmit".into(), flows.to_string(), payload.to_string()]
            }
            Self::Open { flows } => vec!["open".into(), flows.to_string()],
            Self::Memory { flows } => vec!["memory".into(), flows.to_string()],
            Self::Crowd { flows } => vec!["crowd".into(), flows.to_string()],
        }
    }
}

impl Results {
    fn median(&self, case: Case, name: &str) -> f64 {
        let results = self.cases.iter().find(|results| results.case == case);
        results
            .and_then(|results| results.runs.median(name))
            .expect("every case was measured")
    }

    fn print(&self) {
        println!("## Engine\n");
        self.machine.print();
        println!(
            "Thread CPU time per packet. Flows are visited in pseudo-random order; B are payload bytes.\n"
        );
        println!("### Receive: a client's segment, read and acknowledged\n");
        println!("Checksum trusted / verified by the engine; one ACK per packet.\n");
        self.print_table(&RECEIVED, |flows, payload| {
            let case = |checksum| Case::Receive {
                flows,
                payload,
                checksum,
            };
            let cases = [case(Checksum::Trusted), case(Checksum::Unverified)];
            let [trusted, verified] = cases.map(|case| nanos(self.median(case, "ns_per_packet")));
            format!("{trusted} / {verified}{}", self.note(cases[0], payload))
        });
        println!("\n### Transmit: a write by the driver, sent, and the client's ACK\n");
        self.print_table(&TRANSMITTED, |flows, payload| {
            let case = Case::Transmit { flows, payload };
            nanos(self.median(case, "ns_per_packet")) + &self.note(case, payload)
        });
        println!("\n### Connections\n");
        let (open, memory) = (Case::Open { flows: MANY }, Case::Memory { flows: MANY });
        let idle = self.median(memory, "idle_bytes_per_flow");
        println!("Over {} flows:\n", grouped(MANY.into()));
        println!(
            "- open and handshake: {}",
            nanos(self.median(open, "ns_per_connection"))
        );
        println!("- resident per idle flow: {} B", grouped(idle as u64));
        let used = self.median(memory, "used_bytes_per_flow");
        println!(
            "- resident after 4 times 500 B in and 1,400 B out: {} B",
            grouped(used as u64)
        );
        let crowd = |name| self.median(Case::Crowd { flows: CROWD }, name);
        println!(
            "\nOver {} flows, each with one segment of 60 B:\n",
            grouped(CROWD.into())
        );
        println!("- open and handshake: {}", nanos(crowd("ns_per_connection")));
        println!(
            "- the segment, read and acknowledged: {}",
            nanos(crowd("ns_per_packet"))
        );
        for (when, name) in [("idle", "idle_bytes_per_flow"), ("used", "used_bytes_per_flow")] {
            println!("- resident per {when} flow: {} B", grouped(crowd(name) as u64));
        }
        println!("\n### Targets\n");
        let segment = |flows| {
            let case = Case::Receive {
                flows,
                payload: 1460,
                checksum: Checksum::Trusted,
            };
            self.median(case, "ns_per_packet")
        };
        let target = |what: &str, figure: f64, bound: f64| {
            let word = if figure <= bound { "reached" } else { "MISSED" };
            println!(
                "- {what}: {} of {}, {word}",
                grouped(figure as u64),
                grouped(bound as u64)
            );
        };
        target("ns per 1,460 B segment received, one flow", segment(1), 250.0);
        target(
            "ns per 1,460 B segment received, 10,000 cold flows",
            segment(10_000),
            2500.0,
        );
        target("resident bytes per idle flow", idle, 2048.0);
    }

    fn print_table(&self, payloads: &[u32], cell: impl Fn(u32, u32) -> String) {
        let columns: Vec<_> = payloads
            .iter()
            .map(|&payload| grouped(payload.into()) + " B")
            .collect();
        println!("| flows | {} |", columns.join(" | "));
        println!("|---{}|", "|---".repeat(columns.len()));
        for flows in FLOWS {
            let cells: Vec<_> = payloads.iter().map(|&payload| cell(flows, payload)).collect();
            println!("| {} | {} |", grouped(flows.into()), cells.join(" | "));
        }
    }

    /// What a cell has to say where the flows' buffers are smaller than the payload asked for.
    fn note(&self, case: Case, payload: u32) -> String {
        let bytes = self.median(case, "payload_bytes_per_packet") as u64;
        if bytes < u64::from(payload) {
            format!(" ({} B on average: the window)", grouped(bytes))
        } else {
            String::new()
        }
    }
}

fn nanos(nanos: f64) -> String {
    if nanos < 10_000.0 {
        format!("{} ns", grouped(nanos.round() as u64))
    } else {
        format!("{:.1} µs", nanos / 1000.0)
    }
}
