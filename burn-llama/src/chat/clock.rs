//! The clock that a template sees.

use jiff::civil::DateTime;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use jiff::{Unit, ZonedDateTime};

/// Returns the local time, to the second.
pub(super) fn now() -> DateTime {
    let now = ZonedDateTime::now().datetime();
    now.round(Unit::Second).unwrap_or(now)
}

/// Formats a time as `datetime.strftime` does in the C locale. A time without a zone has no `%z` and `%Z`.
///
/// # Errors
///
/// A directive that is unknown, with its name.
pub(super) fn strftime(format: &str, time: DateTime) -> Result<String, jiff::Error> {
    let config = Config::new().custom(PosixCustom::new());
    let mut out = String::new();
    let mut rest = format;
    // `%f` are microseconds in Python; the zone is empty. The other directives are those of jiff.
    while let Some(start) = rest.find('%') {
        let length = 1 + rest[start + 1..].chars().next().map_or(0, char::len_utf8);
        let replacement = match &rest[start..start + length] {
            "%f" => Some("%6f"),
            "%z" | "%Z" => Some(""),
            _ => None,
        };
        out.push_str(&rest[..start]);
        out.push_str(replacement.unwrap_or(&rest[start..start + length]));
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    BrokenDownTime::from(time).to_string_with_config(&config, out)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn times_are_written_as_in_python() {
        let time = "2024-02-09T23:05:09".parse().unwrap();
        for (format, expected) in [
            ("%d %b %Y", "09 Feb 2024"),
            ("%-d %B %y%%, %H:%M:%S", "9 February 24%, 23:05:09"),
            ("%F %A %j %I %p", "2024-02-09 Friday 040 11 PM"),
            ("%e|%k|%l|%-I|%-m", " 9|23|11|11|2"),
            ("%c|%x|%X|%D|%T|%R", "Fri Feb  9 23:05:09 2024|02/09/24|23:05:09|02/09/24|23:05:09|23:05"),
            ("%a %u %w %U %W %V %G", "Fri 5 5 05 06 06 2024"),
            ("%f[%z%Z]", "000000[]"),
            ("é%Y年", "é2024年"),
        ] {
            assert_eq!(strftime(format, time).unwrap(), expected, "{format}");
        }
        for format in ["%Q1", "%", "100%!"] {
            assert!(strftime(format, time).is_err(), "{format}");
        }
    }
}
