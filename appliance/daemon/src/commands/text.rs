//! Numbers as people say them.

use std::time::Duration;

/// A number of bytes, as people say it.
pub(super) fn bytes(count: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    match (unit, value) {
        (0, _) => format!("{count} B"),
        (_, value) if value < 9.995 => format!("{value:.2} {}", units[unit]),
        (_, value) if value < 99.95 => format!("{value:.1} {}", units[unit]),
        (_, value) => format!("{value:.0} {}", units[unit]),
    }
}

/// A number of things, one of which is `what`.
pub(super) fn count(number: usize, what: &str) -> String {
    match (number, what.strip_suffix('y')) {
        (1, _) => format!("1 {what}"),
        (_, Some(stem)) => format!("{number} {stem}ies"),
        (_, None) => format!("{number} {what}s"),
    }
}

/// A time with its two largest units, as people say it.
pub(super) fn time(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits_that_count() {
        for (count, expected) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (9_994, "9.99 kB"),
            (9_995, "10.0 kB"),
            (100_000, "100 kB"),
            (999_500, "1.00 MB"),
            (1_234_567_890, "1.23 GB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
    }

    #[test]
    fn counts_have_their_plural() {
        assert_eq!(count(1, "open flow"), "1 open flow");
        assert_eq!(count(0, "open flow"), "0 open flows");
        assert_eq!(count(2, "entry"), "2 entries");
    }

    #[test]
    fn times_have_their_two_largest_units() {
        for (seconds, expected) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min 0 s"),
            (3_599, "59 min 59 s"),
            (90_061, "1 d 1 h"),
            (7_260, "2 h 1 min"),
        ] {
            assert_eq!(time(Duration::from_secs(seconds)), expected);
        }
    }
}
