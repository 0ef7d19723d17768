//! A pair of virtual interfaces in network and mount namespaces of the test's own, and raw frames on them.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// Runs `test` in namespaces that go when it ends, with the interfaces `near` and `far` joined by a wire. Skips
/// aloud without root.
pub(crate) fn on_a_wire(test: impl FnOnce() + Send) {
    let result = thread::scope(|scope| {
        let run = || {
            if let Err(error) = unshare() {
                println!("skipped: cannot make namespaces: {error}");
                return;
            }
            // The kernel would send neighbour discovery and group reports whenever it likes.
            for interfaces in ["all", "default"] {
                let switch = format!("/proc/sys/net/ipv6/conf/{interfaces}/disable_ipv6");
                if Path::new(&switch).exists() {
                    fs::write(&switch, "1").expect("root may, in a namespace of its own");
                }
            }
            run("ip link add near type veth peer name far");
            run("ip link set lo up");
            run("ip link set near up");
            run("ip link set far up");
            test();
        };
        scope.spawn(run).join()
    });
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Network and mount namespaces for this thread, with a /sys that shows the new network.
fn unshare() -> io::Result<()> {
    // SAFETY: affects this thread only, which the test owns.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) })?;
    let nothing = std::ptr::null();
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: the strings end with a zero byte.
    check(unsafe { libc::mount(nothing, c"/".as_ptr(), nothing, flags, nothing.cast()) })?;
    // SAFETY: as above.
    check(unsafe {
        libc::mount(
            c"sysfs".as_ptr(),
            c"/sys".as_ptr(),
            c"sysfs".as_ptr(),
            0,
            nothing.cast(),
        )
    })
}

/// Runs a command line, which must succeed, and returns what it prints.
pub(crate) fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().expect("a command"))
        .args(words)
        .output()
        .expect("it can be run");
    assert!(
        output.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A raw socket on an interface.
pub(crate) struct Tap(OwnedFd);

impl Tap {
    /// Opens it; everything that comes in or goes out from then on can be read.
    pub(crate) fn open(interface: &str) -> Self {
        let name = CString::new(interface).expect("a name");
        // SAFETY: the name ends with a zero byte.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: makes a descriptor, or fails.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        // SAFETY: just made, and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let room: libc::c_int = 64 << 20;
        // SAFETY: the option is an int.
        check(unsafe {
            let value = (&raw const room).cast();
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                value,
                4,
            )
        })
        .expect("root may have a large buffer");
        // SAFETY: a structure of plain numbers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        // SAFETY: the address is as long as said.
        check(unsafe {
            let length = size_of::<libc::sockaddr_ll>() as u32;
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length)
        })
        .expect("the interface is there");
        Self(socket)
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &[u8]) {
        loop {
            // SAFETY: the bytes live through the call.
            let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
            if sent == frame.len() as isize {
                return;
            }
            let error = io::Error::last_os_error();
            assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{error}");
        }
    }

    /// Waits for the next frame that came in, much longer than it can take.
    pub(crate) fn receive(&self) -> Option<Vec<u8>> {
        self.receive_within(Duration::from_secs(30))
    }

    /// Waits for the next frame that came in.
    pub(crate) fn receive_within(&self, limit: Duration) -> Option<Vec<u8>> {
        loop {
            let mut poll = libc::pollfd {
                fd: self.0.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one descriptor.
            let ready = unsafe { libc::poll(&mut poll, 1, limit.as_millis() as i32) };
            if ready <= 0 {
                return None;
            }
            let mut frame = vec![0; 2048];
            // SAFETY: a structure of plain numbers.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut from_length = size_of::<libc::sockaddr_ll>() as u32;
            // SAFETY: there is room for the frame and for the address.
            let length = unsafe {
                let buffer = frame.as_mut_ptr().cast();
                let address = (&raw mut from).cast();
                libc::recvfrom(
                    self.0.as_raw_fd(),
                    buffer,
                    frame.len(),
                    0,
                    address,
                    &mut from_length,
                )
            };
            frame.truncate(usize::try_from(length).expect("a frame was ready"));
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                return Some(frame);
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
