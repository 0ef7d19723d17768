//! `cargo xtask soak`: the long forms of the tests, in rounds until the time is over.
//!
//! Every round has other random numbers. The table [`STEPS`] says what a round consists of; a step that is under way when
//! the time is over is ended and counts for nothing. The first failure ends the run and says how to see it again.

use std::env;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use crate::digests;
use crate::workspace::Workspace;

#[derive(Args)]
pub(crate) struct Options {
    /// How long to go on; building the tests comes on top
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// Only steps whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// A step of every round.
struct Step {
    name: &'static str,
    work: Work,
}

enum Work {
    /// One digest of every capture, whatever the build and the number of threads: in the first round only, as nothing
    /// about it is random.
    Digests,
    /// A test binary of a package, with what makes it long.
    Tests {
        package: &'static str,
        /// Of the package: where cargo would start the tests, and where they look for regression files.
        folder: &'static str,
        test: &'static str,
        environment: &'static [(&'static str, Amount)],
    },
}

/// The value of an environment variable.
#[derive(Clone, Copy)]
enum Amount {
    Fixed(u32),
    /// Another one in every round.
    Round,
}

/// Tests with a real device, one after the other: their programs have time limits of their own.
const LIVE: &[(&str, Amount)] = &[
    ("TUNGATE_LONG", Amount::Fixed(1)),
    ("RUST_TEST_THREADS", Amount::Fixed(1)),
];

const STEPS: &[Step] = &[
    Step {
        name: "digests",
        work: Work::Digests,
    },
    Step {
        name: "mutation",
        work: Work::Tests {
            package: "tungate-tests",
            folder: "tests",
            test: "mutation",
            environment: &[
                ("MUTATED_PACKETS", Amount::Fixed(5_000_000)),
                ("MUTATED_SEED", Amount::Round),
            ],
        },
    },
    Step {
        name: "recovery",
        work: Work::Tests {
            package: "tungate-engine",
            folder: "appliance/engine",
            test: "recovery",
            environment: &[
                ("RECOVERY_STEPS", Amount::Fixed(100_000_000)),
                ("RECOVERY_SEGMENTS", Amount::Fixed(10_000_000)),
                ("RECOVERY_SEED", Amount::Round),
            ],
        },
    },
    Step {
        name: "link",
        work: Work::Tests {
            package: "tungate-sim",
            folder: "sim",
            test: "link",
            environment: &[
                ("LINK_SEEDS", Amount::Fixed(40)),
                ("LINK_BYTES", Amount::Fixed(4_000_000)),
                ("LINK_SEED", Amount::Round),
            ],
        },
    },
    Step {
        name: "model",
        work: Work::Tests {
            package: "tungate-tests",
            folder: "tests",
            test: "model",
            environment: &[("PROPTEST_CASES", Amount::Fixed(20_000))],
        },
    },
    Step {
        name: "contract",
        work: Work::Tests {
            package: "tungate-tests",
            folder: "tests",
            test: "contract",
            environment: &[("PROPTEST_CASES", Amount::Fixed(5_000))],
        },
    },
    Step {
        name: "closed loop",
        work: Work::Tests {
            package: "tungate-tests",
            folder: "tests",
            test: "closed_loop",
            environment: &[("PROPTEST_CASES", Amount::Fixed(2_000))],
        },
    },
    Step {
        name: "second opinion",
        work: Work::Tests {
            package: "tungate-prefilter",
            folder: "bpf/prefilter",
            test: "second_opinion",
            environment: &[("PROPTEST_CASES", Amount::Fixed(5_000))],
        },
    },
    Step {
        name: "kernel pre-filter",
        work: Work::Tests {
            package: "tungate-sim",
            folder: "sim",
            test: "prefilter",
            environment: &[("TUNGATE_LONG", Amount::Fixed(1))],
        },
    },
    Step {
        name: "live relay",
        work: Work::Tests {
            package: "tungate",
            folder: "appliance/daemon",
            test: "relay",
            environment: LIVE,
        },
    },
    Step {
        name: "live programs",
        work: Work::Tests {
            package: "tungate",
            folder: "appliance/daemon",
            test: "programs",
            environment: LIVE,
        },
    },
    Step {
        name: "live faults",
        work: Work::Tests {
            package: "tungate",
            folder: "appliance/daemon",
            test: "faults",
            environment: LIVE,
        },
    },
    Step {
        name: "live floods",
        work: Work::Tests {
            package: "tungate",
            folder: "appliance/daemon",
            test: "floods",
            environment: LIVE,
        },
    },
    Step {
        name: "live proxies",
        work: Work::Tests {
            package: "tungate",
            folder: "appliance/daemon",
            test: "proxies",
            environment: LIVE,
        },
    },
    Step {
        name: "live recorded",
        work: Work::Tests {
            package: "tungate",
            folder: "appliance/daemon",
            test: "recorded",
            environment: LIVE,
        },
    },
];

/// A step made ready: test binaries are built.
struct Ready {
    step: &'static Step,
    binary: Option<PathBuf>,
}

/// How a step ended.
#[derive(Debug)]
enum Ending {
    Passed,
    Failed(String),
    OutOfTime,
}

/// Runs rounds until the time is over or something fails; the exit code says which.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    let chosen = STEPS.iter().filter(|step| {
        let only = options.only.as_deref();
        only.is_none_or(|part| step.name.contains(part))
    });
    let mut steps = Vec::new();
    for step in chosen {
        println!("building {}", step.name);
        steps.push(step.make_ready(workspace)?);
    }
    if steps.is_empty() {
        let names: Vec<_> = STEPS.iter().map(|step| step.name).collect();
        anyhow::bail!("no step has such a name\nhint: there are {}", names.join(", "));
    }
    let started = Instant::now();
    let deadline = started + Duration::from_secs(options.minutes * 60);
    let mut passed = 0;
    for round in 1.. {
        let mut worked = false;
        for ready in &steps {
            if round > 1 && !ready.has_randomness() {
                continue;
            }
            worked = true;
            let since = Instant::now();
            let ending = ready.run(workspace, round, deadline)?;
            println!(
                "{:6.1} min  round {round}  {:<16}{:8.1} s  {ending}",
                started.elapsed().as_secs_f64() / 60.0,
                ready.step.name,
                since.elapsed().as_secs_f64(),
            );
            match ending {
                Ending::Passed => passed += 1,
                Ending::Failed(_) => return Ok(ExitCode::FAILURE),
                Ending::OutOfTime => return Ok(summary(passed)),
            }
        }
        if !worked {
            break;
        }
    }
    Ok(summary(passed))
}

/// A run in which no step came to its end has shown nothing.
fn summary(passed: u32) -> ExitCode {
    println!("{passed} steps passed");
    if passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

impl Step {
    fn make_ready(&'static self, workspace: &Workspace) -> Result<Ready> {
        let binary = match self.work {
            Work::Digests => None,
            Work::Tests { package, test, .. } => {
                let arguments = [
                    "test",
                    "--profile=soak",
                    "--no-run",
                    "--package",
                    package,
                    "--test",
                    test,
                ];
                Some(workspace.executable(&arguments)?)
            }
        };
        Ok(Ready { step: self, binary })
    }
}

impl Ready {
    fn has_randomness(&self) -> bool {
        match self.step.work {
            Work::Digests => false,
            Work::Tests { .. } => true,
        }
    }

    fn run(&self, workspace: &Workspace, round: u32, deadline: Instant) -> Result<Ending> {
        if Instant::now() >= deadline {
            return Ok(Ending::OutOfTime);
        }
        match &self.binary {
            Some(binary) => self.run_tests(workspace, binary, round, deadline),
            None => {
                let shipped = workspace.root.join("captures");
                let folder = env::var_os("TUNGATE_CAPTURES").map_or(shipped, PathBuf::from);
                Ok(match digests::check(workspace, &folder) {
                    Ok(captures) => {
                        println!("{captures} captures, 6 replays each");
                        Ending::Passed
                    }
                    Err(error) => Ending::Failed(format!("{error:#}")),
                })
            }
        }
    }

    fn run_tests(
        &self,
        workspace: &Workspace,
        binary: &Path,
        round: u32,
        deadline: Instant,
    ) -> Result<Ending> {
        let Work::Tests {
            package,
            folder: home,
            test,
            environment,
        } = self.step.work
        else {
            unreachable!("only tests have a binary");
        };
        let folder = workspace.target.join("soak");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let log = folder.join(format!("{}-{round}.log", self.step.name.replace(' ', "-")));
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(binary);
        let values: Vec<(&str, String)> = environment
            .iter()
            .map(|&(name, amount)| (name, amount.in_round(round).to_string()))
            .collect();
        command
            .arg("--nocapture")
            .envs(values.iter().map(|(name, value)| (*name, value)))
            .current_dir(workspace.root.join(home))
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("cannot share the log")?)
            .stderr(output);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;
        let Some(succeeded) = wait(&mut child, deadline)? else {
            return Ok(Ending::OutOfTime);
        };
        if succeeded {
            fs::remove_file(&log).with_context(|| format!("cannot remove {}", log.display()))?;
            return Ok(Ending::Passed);
        }
        let set: Vec<String> = values
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        Ok(Ending::Failed(format!(
            "see {}\n  reproduce   {} cargo test --profile=soak -p {package} --test {test}",
            log.display(),
            set.join(" ")
        )))
    }
}

impl Amount {
    fn in_round(self, round: u32) -> u32 {
        match self {
            Self::Fixed(amount) => amount,
            Self::Round => round,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Failed(why) => write!(f, "FAILED\n{why}"),
            Self::OutOfTime => f.write_str("ended: the time is over"),
        }
    }
}

/// Waits until a child is done; `None`, and the child is ended, at the deadline.
fn wait(child: &mut Child, deadline: Instant) -> Result<Option<bool>> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a test")? {
            return Ok(Some(status.success()));
        }
        if Instant::now() >= deadline {
            child.kill().context("cannot end a test")?;
            child.wait().context("cannot wait for a test")?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(200));
    }
}
