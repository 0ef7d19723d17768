//! Why the pre-filter passed or dropped a packet.

/// Number of [`Reason`]s.
pub const REASONS: usize = 6;

/// Why the pre-filter passed or dropped a packet; counted per reason in [`map::REASONS`](crate::map::REASONS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Reason {
    /// Passed: no entry fitted.
    NoMatch = 0,
    /// Passed: the entry that decided says `allow`.
    Allowed = 1,
    /// Passed: no IPv4 or IPv6 behind at most [`MAX_VLAN_TAGS`](crate::MAX_VLAN_TAGS) tags.
    NotIp = 2,
    /// Passed: headers that are cut, contradict themselves or go on for too long.
    NotUnderstood = 3,
    /// Dropped: an entry that says `deny` decided by the source address.
    ListSource = 4,
    /// Dropped: an entry that says `deny` decided by the destination address.
    ListDestination = 5,
}

impl Reason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; REASONS] = [
        Self::NoMatch,
        Self::Allowed,
        Self::NotIp,
        Self::NotUnderstood,
        Self::ListSource,
        Self::ListDestination,
    ];

    /// Whether packets with this reason are dropped.
    pub const fn is_drop(self) -> bool {
        match self {
            Self::NoMatch | Self::Allowed | Self::NotIp | Self::NotUnderstood => false,
            Self::ListSource | Self::ListDestination => true,
        }
    }

    /// The name in reports and counters; drops by lists begin with `list`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoMatch => "no-match",
            Self::Allowed => "allowed",
            Self::NotIp => "not-ip",
            Self::NotUnderstood => "not-understood",
            Self::ListSource => "list-source",
            Self::ListDestination => "list-destination",
        }
    }

    /// The reason with this number, as events and map keys hold it.
    pub const fn from_number(number: u32) -> Option<Self> {
        if (number as usize) < REASONS {
            Some(Self::ALL[number as usize])
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_keep_their_numbers() {
        for (number, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number);
            assert_eq!(Reason::from_number(number as u32), Some(reason));
        }
        assert_eq!(Reason::from_number(REASONS as u32), None);
    }
}
