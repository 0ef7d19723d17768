//! Peers of a conversation, and what processes hold for it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

use super::{Lab, Namespace, PATIENCE};

/// A connection through the appliance: the client's end and the server's.
pub fn connection(lab: &Lab, address: &str) -> (TcpStream, TcpStream) {
    let listener = lab.server.listen(address);
    let client = lab.host.connect(address).unwrap();
    let (server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (client, server)
}

pub fn reset(stream: TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream.as_fd(), sockopt::Linger, &linger).unwrap();
}

/// Accepts connections at `address` and sends back what comes in each, until it is dropped.
pub struct Echo;

impl Echo {
    pub fn start(namespace: &Namespace, address: &str) -> Self {
        let listener = namespace.listen(address);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut writer = stream.try_clone().unwrap();
                    let _ = std::io::copy(&mut &stream, &mut writer);
                });
            }
        });
        Self
    }
}

#[track_caller]
pub fn is_echoed(stream: &mut TcpStream) {
    stream.write_all(b"still there?").unwrap();
    let mut heard = [0; 12];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"still there?");
}

/// What a process holds: descriptors, and kilobytes of memory.
pub fn held(pid: nix::unistd::Pid) -> (usize, usize) {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let memory = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    (
        descriptors,
        memory.split_whitespace().nth(1).unwrap().parse().unwrap(),
    )
}
