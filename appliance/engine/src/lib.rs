//! The appliance's whole behaviour as a state machine without I/O, clock or entropy of its own.
