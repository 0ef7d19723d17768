//! Map layouts, limits and the header walk that the XDP program and its loaders share.
#![no_std]
