//! The link model on the real clock: packets of the kernel between two TUN devices in two namespaces.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tungate_engine::Timestamp;
use tungate_sim::link::{Pipe, PipeCounts, Shape};

use super::namespace::{Namespace, ip};
use super::priority::{Priority, raise};
use super::wakes::Watch;

/// Packets taken from a device before the other has its turn.
const BATCH: usize = 64;
/// `IFF_TUN | IFF_NO_PI`: packets start at their IP header, and the kernel segments what is larger than the MTU.
const PLAIN_TUN: libc::c_short = 0x0001 | 0x1000;
/// What the device is called in either namespace.
pub(super) const NAME: &str = "path";

/// The end of a path in a namespace.
pub(super) struct End(File);

impl End {
    /// Makes a device in a namespace, with the address and prefix length given.
    pub(super) fn new(namespace: &Namespace, address: &str) -> Result<Self> {
        let make = || -> Result<Self> {
            let device = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")
                .context("cannot open /dev/net/tun")?;
            // SAFETY: all zeros are a value of this structure of numbers.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_flags = PLAIN_TUN;
            // SAFETY: the device is open, and the request is what this call takes.
            let done = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
            ensure!(
                done == 0,
                "cannot make a TUN device: {}",
                io::Error::last_os_error()
            );
            ip(&format!("address add {address} dev {NAME}"))?;
            // No packet may be dropped here, where nobody counts.
            ip(&format!("link set {NAME} up mtu 1500 txqueuelen 20000"))?;
            Ok(Self(device))
        };
        namespace.run(make)
    }
}

/// What the forwarder has done.
pub(super) struct Forwarded {
    pub(super) to_client: PipeCounts,
    /// By how many nanoseconds packets left after their time; sorted.
    pub(super) late: Vec<u32>,
    pub(super) watch: Watch,
}

/// Carries packets between `server` and `client` until told to stop. Its thread becomes a real-time one.
pub(super) fn forward(
    (server, client): (&End, &End),
    (to_client, to_server): (Shape, Shape),
    seed: u64,
    stop: &AtomicBool,
) -> Result<Forwarded> {
    raise(Priority::Path);
    let mut ways = [
        Way::new(&server.0, &client.0, to_client, seed),
        Way::new(&client.0, &server.0, to_server, !seed),
    ];
    let clock = Instant::now();
    let timer = Timer::new()?;
    let mut buffer = vec![0; 65_536];
    let mut watch = Watch::default();
    while !stop.load(Ordering::Relaxed) {
        let mut is_busy = false;
        let [down, up] = &mut ways;
        is_busy |= down.collect(&clock, &mut buffer, |now, packet| {
            watch.taken(now);
            watch.sent(now, packet);
        })?;
        down.deliver(&clock, |now, due, _| watch.handed_over(now, due))?;
        is_busy |= up.collect(&clock, &mut buffer, |now, _| watch.taken(now))?;
        up.deliver(&clock, |now, due, packet| {
            watch.handed_over(now, due);
            watch.given(now, packet);
        })?;
        if is_busy {
            continue;
        }
        let next = ways.iter().filter_map(|way| way.pipe.next()).min();
        let now = now(&clock);
        // Woken at least ten times a second, to see whether to stop.
        let pause = next.map_or(Duration::from_millis(100), |at| at.since(now));
        if !pause.is_zero() {
            timer.wait(pause.min(Duration::from_millis(100)), [&server.0, &client.0])?;
        }
    }
    let [down, up] = ways;
    let mut late = down.late;
    late.extend(up.late);
    late.sort_unstable();
    Ok(Forwarded {
        to_client: down.pipe.counts(),
        late,
        watch,
    })
}

fn now(clock: &Instant) -> Timestamp {
    Timestamp::from_nanos(clock.elapsed().as_nanos() as u64)
}

/// One direction.
struct Way<'a> {
    from: &'a File,
    to: &'a File,
    pipe: Pipe<Box<[u8]>>,
    late: Vec<u32>,
}

impl<'a> Way<'a> {
    fn new(from: &'a File, to: &'a File, shape: Shape, seed: u64) -> Self {
        Self {
            from,
            to,
            pipe: Pipe::new(shape, seed),
            late: Vec::new(),
        }
    }

    /// Takes what waits in the device and says of what; `true` if that may not have been all.
    fn collect(
        &mut self,
        clock: &Instant,
        buffer: &mut [u8],
        mut taken: impl FnMut(Timestamp, &[u8]),
    ) -> Result<bool> {
        for _ in 0..BATCH {
            match self.from.read(buffer) {
                Ok(len) => {
                    // Neighbour discovery and the like are none of the path's business.
                    if buffer[0] >> 4 == 4 {
                        let now = now(clock);
                        self.pipe.send(now, len, buffer[..len].into());
                        taken(now, &buffer[..len]);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error).context("cannot read from the path's device"),
            }
        }
        Ok(true)
    }

    /// Hands over what has arrived, and says of each when it was and when it was due.
    fn deliver(
        &mut self,
        clock: &Instant,
        mut handed_over: impl FnMut(Timestamp, Timestamp, &[u8]),
    ) -> Result<()> {
        let arrived_by = now(clock);
        while let Some((due, packet)) = self.pipe.receive(arrived_by) {
            let now = now(clock);
            self.late
                .push(u32::try_from(now.since(due).as_nanos()).unwrap_or(u32::MAX));
            handed_over(now, due, &packet);
            self.to
                .write_all(&packet)
                .context("cannot write to the path's device")?;
        }
        Ok(())
    }
}

/// A timer that is exact to microseconds.
struct Timer(OwnedFd);

impl Timer {
    fn new() -> Result<Self> {
        // SAFETY: the call takes numbers.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK) };
        ensure!(fd >= 0, "cannot make a timer: {}", io::Error::last_os_error());
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sleeps for a time, or until one of the files can be read.
    fn wait(&self, pause: Duration, files: [&File; 2]) -> Result<()> {
        let value = libc::timespec {
            tv_sec: pause.as_secs() as libc::time_t,
            tv_nsec: pause.subsec_nanos().into(),
        };
        let setting = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: value,
        };
        // SAFETY: the descriptor is open, and the setting lives through the call.
        let done =
            unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &raw const setting, std::ptr::null_mut()) };
        ensure!(done == 0, "cannot set a timer: {}", io::Error::last_os_error());
        let poll = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut polled = [self.0.as_raw_fd(), files[0].as_raw_fd(), files[1].as_raw_fd()].map(poll);
        // SAFETY: the pointer and the count are those of a live array.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
        Ok(())
    }
}
