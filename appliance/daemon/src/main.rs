//! The appliance's program: it drives engines with a TUN device and sockets, and sets its host up for that.
//!
//! `driver` carries packets between a device, engines and upstreams; `upstream` are sockets, `egress` the ways out;
//! `host` changes routes and rules and undoes it; `bypass` leaves flows to the kernel; `commands` are what the user can ask for. `tungate run` is two
//! processes: the `supervisor` has privileges and sees no packet, the `worker` relays and has none; they talk over the
//! `link`. By the `control` socket a running appliance is asked and told things.

mod bypass;
mod cli;
mod commands;
mod control;
mod driver;
mod egress;
mod host;
mod link;
mod logs;
mod supervisor;
mod upstream;
mod worker;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    match commands::carry_out(arguments) {
        Ok(code) => code,
        Err(error) => {
            match error.downcast_ref::<commands::Rendered>() {
                Some(mistakes) => eprintln!("{mistakes}"),
                None => eprintln!("error: {error:#}"),
            }
            ExitCode::FAILURE
        }
    }
}
