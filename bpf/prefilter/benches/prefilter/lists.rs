//! The lists, and what loading and changing them takes.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol, PolicySpec};

/// First address of the listed range. Every second /24 from here on is listed, and one address in each of the others.
pub(crate) const BASE: u32 = 0x2000_0000;

/// From one listed /24 to the next.
pub(crate) const STRIDE: u32 = 512;

/// Entry number `index` of a list.
pub(crate) fn network(index: u32) -> Ipv4Net {
    let pair = index / 2;
    let (address, length) = match index % 2 {
        0 => (BASE + pair * STRIDE, 24),
        _ => (BASE + pair * STRIDE + 256 + pair % 256, 32),
    };
    Ipv4Net::new(Ipv4Addr::from_bits(address), length).expect("a length up to 32")
}

pub(crate) fn deny(network: Ipv4Net) -> ListEntry {
    ListEntry {
        action: ListAction::Deny,
        network: network.into(),
        protocol: ListProtocol::Any,
        ports: None,
        expires: None,
    }
}

/// The list of this many entries.
pub(crate) fn policy(entries: u32) -> PolicySpec {
    PolicySpec {
        lists: (0..entries).map(|index| deny(network(index))).collect(),
        ..PolicySpec::default()
    }
}

#[cfg(target_os = "linux")]
pub(crate) use self::kernel::measure;

#[cfg(target_os = "linux")]
mod kernel {
    use std::fs;
    use std::time::Instant;

    use tungate_prefilter::Prefilter;
    use tungate_prefilter::kernel::{Kernel, Options};

    use super::{deny, network, policy};
    use crate::Figures;

    /// How often a single entry is added and removed again.
    const CHANGES: u32 = 200;

    /// Loads and changes a list of this many entries; the program is loaded, and attached nowhere.
    pub(crate) fn measure(entries: u32) -> Figures {
        let mut prefilter = Prefilter::<Kernel>::load(Options::default()).expect("root may load it");
        let policy = policy(entries);
        let before = map_bytes();
        let mut seconds = |what: &mut dyn FnMut(&mut Prefilter<Kernel>)| {
            let start = Instant::now();
            what(&mut prefilter);
            start.elapsed().as_secs_f64()
        };
        let load = seconds(&mut |prefilter| _ = prefilter.apply(&policy, 0).expect("it fits"));
        let bytes = map_bytes() - before;
        let swap = seconds(&mut |prefilter| _ = prefilter.apply(&policy, 0).expect("it fits"));
        // Behind the others, so that they are new.
        let more: Vec<_> = (0..CHANGES)
            .map(|change| deny(network((entries + 2 * change) | 1)))
            .collect();
        let adding = seconds(&mut |prefilter| {
            for entry in &more {
                prefilter.add(entry.clone(), 0).expect("it fits");
            }
        });
        let removing = seconds(&mut |prefilter| {
            for _ in &more {
                let last = prefilter.entries().len() as u32 - 1;
                prefilter.remove(last).expect("it is there");
            }
        });
        // The memory of what was removed is given out again only when nobody can be reading it.
        let waiting = seconds(&mut |prefilter| _ = prefilter.add(more[0].clone(), 0).expect("it fits"));
        let microseconds = |seconds: f64| seconds * 1e6 / f64::from(CHANGES);
        vec![
            ("load_seconds".to_owned(), load),
            ("swap_seconds".to_owned(), swap),
            ("map_bytes".to_owned(), bytes),
            ("add_microseconds".to_owned(), microseconds(adding)),
            ("remove_microseconds".to_owned(), microseconds(removing)),
            ("add_after_removal_microseconds".to_owned(), waiting * 1e6),
            ("peak_bytes".to_owned(), peak_bytes()),
        ]
    }

    /// Memory of all maps that this process has open, as the kernel tells it.
    fn map_bytes() -> f64 {
        let files = fs::read_dir("/proc/self/fdinfo").expect("the process has descriptors");
        let texts = files.filter_map(|file| fs::read_to_string(file.ok()?.path()).ok());
        let sizes = texts
            .filter(|text| text.contains("map_type:"))
            .filter_map(|text| crate::drop::field(&text, "memlock:"));
        sizes.sum()
    }

    fn peak_bytes() -> f64 {
        let status = fs::read_to_string("/proc/self/status").expect("the process has a status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kilobytes.expect("it tells the peak") * 1024.0
    }
}
