//! What the tests compare with: a parser and a list lookup of their own, written for plainness and sharing no
//! code with the program, its walk or the engine; and generators of lists and packets.

#![allow(dead_code, reason = "every test binary uses a part of it")]

pub(crate) mod frames;
pub(crate) mod model;
#[cfg(feature = "kernel")]
pub(crate) mod wire;
