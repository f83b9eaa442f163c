//! Python's `json.dumps` and `strftime`, as far as chat templates need them.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The keyword arguments of `json.dumps`.
pub(super) struct JsonDumps {
    /// Spaces per level of nesting; `None` writes a single line.
    pub indent: Option<usize>,
    /// Separator between items.
    pub item_separator: String,
    /// Separator between key and value.
    pub key_separator: String,
    /// True if keys are sorted.
    pub sort_keys: bool,
    /// True if characters outside ASCII are escaped.
    pub ensure_ascii: bool,
}

impl JsonDumps {
    /// Returns the value as JSON in the format of `json.dumps`.
    pub fn dumps(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write_value(value, 1, &mut out)?;
        Ok(out)
    }

    fn write_value(&self, value: &Value, level: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => out.push_str("null"),
            ValueKind::Bool | ValueKind::Number => out.push_str(&value.to_string()),
            ValueKind::String => out.push_str(&self.json_string(value.as_str().unwrap_or_default())),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<_> = value.try_iter()?.collect();
                out.push('[');
                self.write_items(&items, level, out, |item, out| self.write_value(item, level + 1, out))?;
                out.push(']');
            }
            ValueKind::Map => {
                let mut keys: Vec<_> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                out.push('{');
                self.write_items(&keys, level, out, |key, out| {
                    out.push_str(&self.json_string(&key.to_string()));
                    out.push_str(&self.key_separator);
                    self.write_value(&value.get_item(key)?, level + 1, out)
                })?;
                out.push('}');
            }
            other => return Err(Error::new(ErrorKind::BadSerialization, format!("tojson: a {other} is not JSON"))),
        }
        Ok(())
    }

    /// Writes the items between two brackets.
    fn write_items(
        &self,
        items: &[Value],
        level: usize,
        out: &mut String,
        write: impl Fn(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.item_separator);
            }
            self.write_newline(level, out);
            write(item, out)?;
        }
        if !items.is_empty() {
            self.write_newline(level - 1, out);
        }
        Ok(())
    }

    /// Starts a new line at a nesting level, if output is indented.
    fn write_newline(&self, level: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * level));
        }
    }

    /// Returns a string as a quoted JSON string.
    fn json_string(&self, text: &str) -> String {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return quoted;
        }
        let mut out = String::new();
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
        out
    }
}

/// Formats a UTC time, given in seconds since 1970, with `strftime` directives and English names. An unknown directive
/// is an error.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    let days = seconds / 86_400;
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let weekday = DAYS[(days as usize + 4) % 7]; // 1 January 1970 was a Thursday.
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.next();
        // `%-d` is `%d` without its leading zero.
        let bare = directive == Some('-');
        if bare {
            directive = rest.next();
        }
        let part = match directive {
            Some('Y') => format!("{year:04}"),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('j') => format!("{:03}", days - days_before(year) + 1),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('F') => format!("{year:04}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            other => return Err(format!("unknown directive %{}", other.map(String::from).unwrap_or_default())),
        };
        let trimmed = part.trim_start_matches(['0', ' ']);
        out.push_str(match (bare, trimmed.is_empty()) {
            (true, true) => "0",
            (true, false) => trimmed,
            _ => &part,
        });
    }
    Ok(out)
}

/// Returns the number of days from 1 January 1970 to 1 January of a year.
fn days_before(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

/// Returns year, month and day for a number of days since 1 January 1970.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before(year + 1) <= days {
        year += 1;
    }
    let leap = days_before(year + 1) - days_before(year) == 366;
    let mut day = days - days_before(year);
    for month in 1..12 {
        let length = match month {
            2 => 28 + u64::from(leap),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        if day < length {
            return (year, month, day + 1);
        }
        day -= length;
    }
    (year, 12, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01 Thursday 001 12 AM"),
            (951_782_400, "2000-02-29 Tuesday 060 12 AM"),
            (1_709_251_199, "2024-02-29 Thursday 060 11 PM"),
            (1_735_689_599, "2024-12-31 Tuesday 366 11 PM"),
            (4_102_444_800, "2100-01-01 Friday 001 12 AM"),
        ] {
            assert_eq!(strftime("%F %A %j %I %p", seconds).as_deref(), Ok(expected));
        }
        assert_eq!(strftime("%-d %b %y%%, %H:%M:%S", 1_709_251_199).as_deref(), Ok("29 Feb 24%, 23:59:59"));
        assert_eq!(strftime("%-H", 0).as_deref(), Ok("0"));
    }
}
