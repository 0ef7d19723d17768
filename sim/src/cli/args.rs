//! The command line.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use crate::replay::{Checksums, Congestion, Midstream, Prefiltering};
use crate::report::expect::EXAMPLE;

/// Replay captures offline: what would each packet and flow meet, byte for byte the same on every run.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES, after_long_help = long_help())]
pub struct Args {
    /// Captures (pcap or pcapng, also in gzip), journals, folders of captures; - is standard input
    #[arg(required = true, value_name = "CAPTURE")]
    pub(super) captures: Vec<PathBuf>,

    /// The policy; without it everything goes direct
    #[arg(short, long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// Add a list of `deny|allow CIDR [tcp|udp|icmp|any] [PORT|LO-HI|any]` lines to the policy
    #[arg(long, value_name = "FILE")]
    pub(super) list: Vec<PathBuf>,

    /// Replace the policy at a time of the capture, such as 12.5s=night.toml
    #[arg(long, value_name = "TIME=FILE", value_parser = parse_change)]
    pub(super) change: Vec<Change>,

    /// Show which packets and flows fare differently under this policy
    #[arg(long, value_name = "FILE", conflicts_with = "change")]
    pub(super) against: Option<PathBuf>,

    /// Check the report against expectations, for CI
    #[arg(long, value_name = "FILE")]
    pub(super) expect: Option<PathBuf>,

    /// Print everything as JSON
    #[arg(long)]
    pub(super) json: bool,

    /// Write a JSON line per captured packet
    #[arg(long, value_name = "FILE")]
    pub(super) packets: Option<PathBuf>,

    /// Write the packets that clients would have been sent, with decisions as comments
    #[arg(long, value_name = "FILE.pcapng")]
    pub(super) out: Option<PathBuf>,

    /// Write what goes into and comes out of the engine, line by line
    #[arg(long, value_name = "FILE")]
    pub(super) transcript: Option<PathBuf>,

    /// Write everything that enters the engine, to be replayed as a capture is
    #[arg(long, value_name = "FILE")]
    pub(super) journal: Option<PathBuf>,

    /// Count only these addresses as clients
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse_network)]
    pub(super) clients: Vec<IpNet>,

    /// What to do about TCP whose beginning was not captured
    #[arg(long, value_enum, default_value_t)]
    pub(super) midstream: Midstream,

    /// How to judge wrong checksums; auto repairs those that offload left to the network card
    #[arg(long, value_enum, default_value_t)]
    pub(super) checksums: Checksums,

    /// Congestion control towards clients; the capture was shaped already
    #[arg(long, value_enum, default_value_t)]
    pub(super) congestion: Congestion,

    /// Who runs the pre-filter's program; verdicts and digest do not depend on it
    #[arg(long, value_enum, default_value_t)]
    pub(super) prefilter: Prefiltering,

    /// Threads to use; the result does not depend on it [default: one per processor]
    #[arg(long, value_name = "N")]
    pub(super) jobs: Option<NonZeroUsize>,
}

/// A policy that takes over in the middle of a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// Since the capture's first packet.
    pub(super) after: Duration,
    pub(super) file: PathBuf,
}

impl Args {
    /// The files to write, each with its option.
    pub(super) fn outputs(&self) -> Vec<(&'static str, &Path)> {
        let all = [
            ("--packets", &self.packets),
            ("--out", &self.out),
            ("--transcript", &self.transcript),
            ("--journal", &self.journal),
        ];
        all.into_iter()
            .filter_map(|(option, path)| Some((option, path.as_deref()?)))
            .collect()
    }

    /// The first option that is used and says something about a capture, not a journal.
    pub(super) fn for_captures_only(&self) -> Option<&'static str> {
        let used = [
            ("--config", self.config.is_some()),
            ("--list", !self.list.is_empty()),
            ("--change", !self.change.is_empty()),
            ("--against", self.against.is_some()),
            ("--clients", !self.clients.is_empty()),
        ];
        let used = used
            .into_iter()
            .filter_map(|(option, used)| used.then_some(option));
        used.chain(self.outputs().into_iter().map(|(option, _)| option))
            .next()
    }
}

const EXAMPLES: &str = "\
Examples:
  replay capture.pcap                   does it come out as captured?
  replay capture.pcap -c tungate.toml   what a policy does to it
  replay captures/ -c now.toml --against new.toml
                                        what another policy would change
  replay capture.pcap --expect ci.toml  a check for CI
  replay capture.pcap --json | jq .verdicts
  tcpdump -w - | replay -

Exit status:
  0  as expected
  1  an expectation does not hold, --against finds changes, or pre-filter and
     engine contradict each other
  2  a file cannot be used";

fn long_help() -> String {
    let example: String = EXAMPLE.lines().map(|line| format!("  {line}\n")).collect();
    format!("{EXAMPLES}\n\nA file for --expect has any of these lines:\n\n{example}")
}

fn parse_change(text: &str) -> Result<Change, String> {
    let Some((time, file)) = text.split_once('=') else {
        return Err("write TIME=FILE, for instance 12.5s=night.toml".to_owned());
    };
    let after = humantime::parse_duration(time)
        .map_err(|error| format!("\"{time}\" is not a time: {error}; write for instance 12.5s or 2m"))?;
    Ok(Change {
        after,
        file: file.into(),
    })
}

fn parse_network(text: &str) -> Result<IpNet, String> {
    match (text.parse::<IpNet>(), text.parse::<IpAddr>()) {
        (Ok(network), _) => Ok(network.trunc()),
        (_, Ok(address)) => Ok(address.into()),
        (Err(_), Err(_)) => {
            Err("write a network or an address, for instance 10.0.0.0/8 or 2001:db8::/32".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_has_a_time_with_its_unit_and_a_file() {
        let change = |text| parse_change(text);
        let expected = Change {
            after: Duration::from_millis(12_500),
            file: "night.toml".into(),
        };
        assert_eq!(change("12.5s=night.toml"), Ok(expected));
        let expected = Change {
            after: Duration::from_secs(90),
            file: "a=b".into(),
        };
        assert_eq!(change("1m 30s=a=b"), Ok(expected));
        assert!(change("12.5=night.toml").unwrap_err().contains("12.5s or 2m"));
        assert!(change("night.toml").unwrap_err().contains("TIME=FILE"));
        assert!(change("-1s=night.toml").is_err());
    }

    #[test]
    fn clients_are_networks_or_single_addresses() {
        let network = |text: &str| parse_network(text).map(|network| network.to_string());
        assert_eq!(network("10.1.2.3/8").as_deref(), Ok("10.0.0.0/8"));
        assert_eq!(network("2001:db8::1").as_deref(), Ok("2001:db8::1/128"));
        assert!(network("localhost").unwrap_err().contains("10.0.0.0/8"));
    }
}
