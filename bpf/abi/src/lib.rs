//! What the XDP program and its loaders share: map layouts, reasons, limits, and the program's header walk.
//!
//! # Theory of operation
//!
//! Lists are judged by looking the source address up, then the destination address. For one address, entries of
//! one prefix are folded into a [`Group`]: a function from the packet's [`Class`] and port to the entry that
//! decides, with everything that shorter prefixes would add already filled in. So the longest prefix that is in
//! the map answers for the address, and one judgement per address is enough.
//!
//! The longest prefix is found in hash maps keyed by prefix length and masked address. Which lengths are tried,
//! and in which order, is a tree in [`Settings`]: a chain from the longest length down while few lengths are in
//! use, else a binary search, for which the loader leaves markers on the way (Waldvogel, Varghese, Turner and
//! Plattner, *Scalable High Speed IP Routing Lookups*, SIGCOMM 1997). Either way no address costs more than
//! [`MAX_LOOKUPS`] lookups.
//!
//! Entries of prefix length 0 are kept out of the tree, in [`Settings::default4`] and [`Settings::default6`]:
//! they do not apply to packets addressed to the host itself, which is known only packet by packet.
//!
//! Everything a list is made of exists once per slot. [`map::ACTIVE`] holds a generation number, which the program
//! reads once per packet, and whose lowest bit is the slot.
//!
//! All numbers are little-endian; addresses stay in the order in which they lie in the packet.
#![no_std]

mod layout;
mod reason;
mod walk;

pub use layout::{
    Cell, Class, Count, Event, Group, Key4, Key6, NO_NODE, Node4, Node6, Ruling, SLOTS, Settings,
    TREE4_NODES, TREE6_NODES, map,
};
pub use reason::{REASONS, Reason};
pub use walk::{Frame, Selectors, Walk, WalkOutcome, Window, walk};

/// Most VLAN tags that are looked behind; a frame with more is not IP for the pre-filter.
pub const MAX_VLAN_TAGS: usize = 2;

/// Most IPv6 extension headers that are looked behind; a packet with more is not understood.
pub const MAX_EXTENSION_HEADERS: usize = 6;

/// Most map lookups per address: what a binary search over 128 prefix lengths needs.
pub const MAX_LOOKUPS: usize = 8;

/// Most steps of the binary search over ports: enough to find one of 65,536.
pub const MAX_PORT_STEPS: usize = 17;

/// Size of the ring buffer for events, in bytes.
pub const EVENTS_BYTES: usize = 1 << 16;
