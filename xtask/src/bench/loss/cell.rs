//! What is measured: a path, what goes over it, and who sends.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tungate_sim::link::{Discipline, Loss, Queue, Shape};

/// A path and what goes over it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// Megabits of IP packets per second towards the client.
    pub(super) megabits: u64,
    /// Both ways together, with nothing in the queue.
    pub(super) round_trip_millis: u64,
    /// Packets that may wait.
    pub(super) queue: usize,
    pub(super) loss: Losses,
    pub(super) flows: u32,
    pub(super) task: Task,
    /// Every other flow is of somebody else, by Cubic: the kernel, or in the model another engine.
    #[serde(default)]
    pub(super) beside: bool,
}

/// What is lost behind the queue, towards the client.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Losses {
    None,
    /// Percent, each packet by itself.
    Random(f64),
    /// One percent, ten in a row on average.
    Bursts,
}

/// What goes over it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Task {
    /// As much as possible in so many seconds; the flows start 50 ms apart.
    Fill(u64),
    /// So many bytes and FIN, once per run.
    Transfer(u64),
}

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Sender {
    /// The engine, on virtual time.
    Engine(Control),
    /// The kernel, through the forwarder.
    Linux(Control),
    /// A running appliance, through the forwarder.
    Live(Control),
}

/// A congestion control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Control {
    Cubic,
    Bbr,
}

/// What one run has shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(super) seed: u64,
    /// Megabits of payload per second, each flow.
    pub(super) goodput: Vec<f64>,
    /// From the SYN to the last byte, of a transfer that has come to its end.
    pub(super) millis: Option<f64>,
    /// Dropped by the queue, and lost behind it.
    pub(super) drops: (u64, u64),
    /// Segments sent again, where known.
    pub(super) retransmitted: Option<u64>,
    /// Segments that came to the client and were there already, where known.
    pub(super) spurious: Option<u64>,
    /// How late the forwarder was: median, 99th percentile and most, in microseconds.
    pub(super) late: Option<[u64; 3]>,
}

impl Cell {
    /// The two directions of the path.
    pub(super) fn path(&self) -> (Shape, Shape) {
        let way = Shape::delay(Duration::from_micros(self.round_trip_millis * 500));
        let down = Shape {
            rate: self.megabits * 1_000_000,
            queue: Queue {
                packets: self.queue,
                discipline: Discipline::TailDrop,
            },
            loss: match self.loss {
                Losses::None => Loss::None,
                Losses::Random(percent) => Loss::Random(percent / 100.0),
                Losses::Bursts => Loss::Burst {
                    share: 0.01,
                    length: 10.0,
                },
            },
            ..way
        };
        (down, way)
    }

    /// Whether its name has all of these words; `|` stands between those of which one is enough.
    pub(super) fn has(&self, words: &[String]) -> bool {
        let name = self.to_string();
        let has = |word: &str| name.split(' ').any(|part| part == word);
        words.iter().all(|word| word.split('|').any(has))
    }

    /// When flow `index` starts.
    pub(super) fn start(index: u32) -> Duration {
        Duration::from_millis(50) * index
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            megabits,
            round_trip_millis,
            queue,
            loss,
            flows,
            task,
            beside,
        } = self;
        write!(f, "{megabits}M {round_trip_millis}ms q{queue} {loss} x{flows}")?;
        match task {
            Task::Fill(seconds) => write!(f, " {seconds}s")?,
            Task::Transfer(bytes) => write!(f, " {}KB", bytes / 1000)?,
        }
        f.write_str(if *beside { " beside-cubic" } else { "" })
    }
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("0%"),
            Self::Random(percent) => write!(f, "{percent}%"),
            Self::Bursts => f.write_str("bursts"),
        }
    }
}

impl Sender {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Engine(Control::Cubic) => "tungate Cubic",
            Self::Engine(Control::Bbr) => "tungate BBR",
            Self::Live(Control::Cubic) => "live Cubic",
            Self::Live(Control::Bbr) => "live BBR",
            Self::Linux(Control::Cubic) => "Linux Cubic",
            Self::Linux(Control::Bbr) => "Linux BBR",
        }
    }
}

impl Control {
    /// As the kernel calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
        }
    }
}

impl Figures {
    /// Of all flows together.
    pub(super) fn goodput(&self) -> f64 {
        self.goodput.iter().sum()
    }

    /// Jain's index: 1 when all flows get the same, 1/n when one gets everything.
    pub(super) fn fairness(&self) -> f64 {
        let squares: f64 = self.goodput.iter().map(|flow| flow * flow).sum();
        self.goodput().powi(2) / (self.goodput.len() as f64 * squares)
    }
}
