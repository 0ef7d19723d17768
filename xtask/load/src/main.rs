//! The tools of `cargo xtask bench live`: servers, what puts load on them, and the kernel's own relay as a reference.
//!
//! Each call does one thing in one thread and prints what came of it as a line of JSON. Servers run until they are
//! killed.

mod bulk;
mod events;
mod exchange;
mod hold;
mod relay;
mod socks;
mod udp;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;

/// The tools of `cargo xtask bench live`.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    tool: Tool,
}

#[derive(Subcommand)]
enum Tool {
    /// Takes uploads and sends downloads
    BulkServer { address: SocketAddr },
    /// Uploads or downloads over several connections at once
    Bulk(bulk::Options),
    /// Sends back what comes
    EchoServer { address: SocketAddr },
    /// Connects, exchanges 64 bytes and closes, 32 connections at a time
    Connect(exchange::Options),
    /// Exchanges 64 bytes again and again over one connection
    Latency(exchange::Options),
    /// Holds connections that have exchanged 64 bytes each, until a line comes; then each must answer again
    Hold(hold::Options),
    /// Sends datagrams to a target, or to whoever sends the first
    UdpSend(udp::SendOptions),
    /// Counts datagrams until none come any more
    UdpReceive(udp::ReceiveOptions),
    /// Relays connections that nftables redirects here, by splicing
    Relay { address: SocketAddr },
    /// Relays as a SOCKS5 proxy, by splicing
    Socks { address: SocketAddr },
}

fn main() -> ExitCode {
    let done = run(Arguments::parse().tool);
    if let Err(error) = done {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(tool: Tool) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")?;
    match tool {
        Tool::BulkServer { address } => bulk::serve(address),
        Tool::Bulk(options) => print(&bulk::run(&options)?),
        Tool::EchoServer { address } => exchange::serve(address),
        Tool::Connect(options) => print(&exchange::connect(&options)?),
        Tool::Latency(options) => print(&exchange::latency(&options)?),
        Tool::Hold(options) => hold::run(&options),
        Tool::UdpSend(options) => print(&udp::send(&options)?),
        Tool::UdpReceive(options) => print(&udp::receive(&options)?),
        Tool::Relay { address } => relay::run(address, relay::Kind::Transparent),
        Tool::Socks { address } => relay::run(address, relay::Kind::Socks),
    }
}

fn print(result: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(result).context("cannot write JSON")?);
    Ok(())
}

/// Reads a number of seconds.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|error| format!("{error}"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
