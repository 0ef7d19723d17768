//! The recovery core against a client that says anything.

mod hostile;
