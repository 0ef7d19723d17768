//! The command line.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

/// A transparent proxy appliance that ends every TCP and UDP flow in user space and relays it as its policy says.
#[derive(Parser)]
#[command(name = "tungate", version, max_term_width = 110)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Relays the traffic of this host, or of clients that it routes for
    Run(Run),
    /// Runs a command whose only way out is an appliance of its own; needs no root
    Exec(Exec),
    /// Shows what an appliance does with flows, in private namespaces; needs no root and no network
    Demo,
    /// Drops packets by lists on a network card already, with or without an appliance
    #[command(subcommand)]
    Prefilter(Prefilter),
    /// Says whether a configuration is sound, and what is wrong with it
    Check(Check),
    /// Says what the policy does with a flow, and by which list entry or rule
    Why(Why),
    /// Shows the flows that are open in a running appliance
    Flows(Flows),
    /// Shows what a running appliance has dropped and how flows have ended, wherever it took place
    Counters(Counters),
    /// Changes or shows the lists of a running appliance, in the engine and the pre-filter alike
    #[command(subcommand)]
    List(List),
    /// Has a running appliance read its configuration again; with mistakes in it nothing changes
    Reload(Reload),
    /// Has a running appliance refuse new flows, and end when the open ones have ended
    Drain(Drain),
    /// Removes what an appliance that was killed has left on this host
    Cleanup,
    /// Relays for the process that started it
    #[command(hide = true)]
    Worker,
}

#[derive(Subcommand)]
#[command(
    after_help = "Exit codes: 0 done, 1 other failures, 2 wrong usage, 3 not permitted, 4 no such interface, \
    5 an XDP program is there already, 6 not attached, 7 kernel or driver refuses, 8 no such entry"
)]
pub(crate) enum Prefilter {
    /// Attaches the pre-filter with empty lists, and leaves it there: native XDP, or generic where the driver will not
    Attach(PrefilterTarget),
    /// Detaches it
    Detach(PrefilterTarget),
    /// Shows how it is attached, and its lists
    Status {
        /// All of this network namespace without one
        interface: Option<String>,
        /// List the entries, too
        #[arg(long)]
        entries: bool,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Adds a list entry, or gives one another time
    Add {
        interface: String,
        /// How long it holds, as in 90s or `1h 30m`; without it until it is removed
        #[arg(long, value_parser = humantime::parse_duration)]
        ttl: Option<Duration>,
        /// As in a list file, or a prefix alone to deny it: `192.0.2.0/24`, `deny 192.0.2.0/24 tcp 443`
        #[arg(required = true, num_args = 1..)]
        entry: Vec<String>,
    },
    /// Removes a list entry
    Remove {
        interface: String,
        /// As it was added
        #[arg(required = true, num_args = 1..)]
        entry: Vec<String>,
    },
    /// Replaces the lists by those of a file, all at once
    Load {
        interface: String,
        /// Lines of `deny|allow CIDR [tcp|udp|icmp|any] [PORT|LO-HI|any]`
        file: PathBuf,
    },
    /// Shows what was dropped, by reason and by entry
    Stats {
        interface: String,
        /// Again every second, with rates
        #[arg(short, long)]
        watch: bool,
        /// Write JSON, with --watch one object per line
        #[arg(long)]
        json: bool,
    },
    /// Takes entries out when their time is over, until there is none with a time
    #[command(hide = true)]
    Expire(PrefilterTarget),
}

#[derive(Args)]
pub(crate) struct PrefilterTarget {
    /// Name of a network interface
    pub(crate) interface: String,
}

/// What scripts tell failures of commands to a running appliance apart by.
const CONTROL_CODES: &str = "Exit codes: 0 done, 1 other failures, 2 wrong usage, 3 not permitted, \
    6 no appliance runs here, 8 no such entry, 9 the appliance refuses";

#[derive(Args)]
pub(crate) struct Control {
    /// The appliance's control socket, where `control.socket` is another than the usual one
    #[arg(long = "control", value_name = "SOCKET")]
    pub(crate) socket: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = CONTROL_CODES)]
pub(crate) struct Flows {
    #[command(flatten)]
    pub(crate) control: Control,

    /// Again every second, with rates, the busiest first
    #[arg(short, long)]
    pub(crate) watch: bool,

    /// Write JSON, with --watch one object per line
    #[arg(long)]
    pub(crate) json: bool,

    /// Show so many flows at most; --watch on a terminal shows as many as there is room for
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub(crate) limit: Option<std::num::NonZeroUsize>,
}

#[derive(Args)]
#[command(after_help = CONTROL_CODES)]
pub(crate) struct Counters {
    #[command(flatten)]
    pub(crate) control: Control,

    /// Write JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand)]
#[command(after_help = CONTROL_CODES)]
pub(crate) enum List {
    /// Adds an entry, or gives one another time; flows that it denies end at once
    Add {
        #[command(flatten)]
        control: Control,
        /// How long it holds, as in 90s or `1h 30m`; without it until it is removed
        #[arg(long, value_parser = humantime::parse_duration)]
        ttl: Option<Duration>,
        #[command(flatten)]
        entries: ListEntries,
    },
    /// Removes an entry
    Remove {
        #[command(flatten)]
        control: Control,
        #[command(flatten)]
        entries: ListEntries,
    },
    /// Replaces all entries by those of a file, all at once
    Load {
        #[command(flatten)]
        control: Control,
        /// Lines of `deny|allow CIDR [tcp|udp|icmp|any] [PORT|LO-HI|any]`
        file: PathBuf,
    },
    /// Shows the entries in force
    Show {
        #[command(flatten)]
        control: Control,
        /// Only those that this address falls under
        address: Option<IpAddr>,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
pub(crate) struct ListEntries {
    /// As in a list file, or a prefix alone to deny it: `192.0.2.0/24`, `deny 192.0.2.0/24 tcp 443`
    #[arg(required_unless_present = "file")]
    pub(crate) entry: Vec<String>,

    /// All entries of a list file, at once
    #[arg(short, long, conflicts_with = "entry")]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = CONTROL_CODES)]
pub(crate) struct Reload {
    #[command(flatten)]
    pub(crate) control: Control,
}

#[derive(Args)]
#[command(after_help = CONTROL_CODES)]
pub(crate) struct Drain {
    #[command(flatten)]
    pub(crate) control: Control,

    /// How long open flows may go on before they are reset
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
}

#[derive(Args)]
pub(crate) struct Policy {
    /// The configuration; without one everything goes direct
    #[arg(short, long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) policy: Policy,

    /// Relay for the clients behind this interface instead of for this host; may be given several times
    #[arg(long, value_name = "INTERFACE")]
    pub(crate) from: Vec<String>,

    /// Relay for what is plugged in to an Ethernet (TAP) device, with the router's addresses as its gateway
    #[arg(long, conflicts_with = "from")]
    pub(crate) tap: bool,

    /// Make the TAP device a port of this bridge
    #[arg(long, value_name = "BRIDGE", requires = "tap")]
    pub(crate) bridge: Option<String>,

    /// Print every change that would be made to this host, and make none
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// If the appliance dies, let traffic go its usual way; otherwise it is refused until the next run or cleanup
    #[arg(long)]
    pub(crate) fail_open: bool,

    /// Record everything that enters the engine, so that `replay` can repeat it
    #[arg(long, value_name = "FILE")]
    pub(crate) journal: Option<PathBuf>,

    /// Write the log as JSON, one object per line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Check {
    /// The configuration
    #[arg(required_unless_present = "show_defaults")]
    pub(crate) file: Option<PathBuf>,

    /// Print a configuration with every key, its meaning and its default
    #[arg(long, conflicts_with = "file")]
    pub(crate) show_defaults: bool,

    /// Print mistakes as JSON
    #[arg(long, conflicts_with = "show_defaults")]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Why {
    #[command(flatten)]
    pub(crate) policy: Policy,

    /// The flow, as in `tcp 192.0.2.7:443`, `udp [2001:db8::1]:53 from 10.0.0.2` or `icmp 192.0.2.7`
    #[arg(required = true, value_name = "FLOW")]
    pub(crate) flow: Vec<String>,
}

#[derive(Args)]
pub(crate) struct Exec {
    #[command(flatten)]
    pub(crate) policy: Policy,

    /// The name server for the command, instead of this host's
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = name_server)]
    pub(crate) resolver: Option<SocketAddr>,

    /// Record everything that enters the engine, so that `replay` can repeat it
    #[arg(long, value_name = "FILE")]
    pub(crate) journal: Option<PathBuf>,

    /// Tell of every flow when it has ended, not only of those that are denied
    #[arg(short, long)]
    pub(crate) verbose: bool,

    /// The command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub(crate) command: Vec<OsString>,
}

/// Reads an address with or without a port.
fn name_server(text: &str) -> Result<SocketAddr, String> {
    let with_port = || text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53));
    text.parse().or_else(|_| with_port()).map_err(|_| {
        "this is no address, as 192.0.2.53, [2001:db8::53]:5353 or 127.0.0.1:5353 are".to_owned()
    })
}
