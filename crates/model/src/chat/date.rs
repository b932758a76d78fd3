//! `strftime_now`: today's date, in UTC, for templates that tell the model.

use std::time::{Duration, SystemTime};

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
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `now` by a `strftime` format. Directives that no template uses stay as they are.
pub(super) fn strftime(format: &str, now: SystemTime) -> String {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let day_of_year = days - days_before(year) + 1;

    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // `%-d` is `%d` without the zero.
        let bare = chars.next_if_eq(&'-').is_some();
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        let twelve = (hour + 11) % 12 + 1;
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &two(year % 100),
            Some('m') => out += &two(month),
            Some('d') => out += &two(day),
            Some('e') => out += &format!("{day:2}"),
            Some('j') => out += &if bare { day_of_year.to_string() } else { format!("{day_of_year:03}") },
            Some('B') => out += month_name,
            Some('b' | 'h') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &two(hour),
            Some('I') => out += &two(twelve),
            Some('M') => out += &two(minute),
            Some('S') => out += &two(second),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('F') => out += &format!("{year}-{month:02}-{day:02}"),
            Some('T') => out += &format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => out += "UTC",
            Some('z') => out += "+0000",
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                if bare {
                    out.push('-');
                }
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a day since 1970-01-01 (Howard Hinnant's `civil_from_days`, for days not before then).
fn civil(days: u64) -> (u64, u64, u64) {
    let from_march_0 = days + 719_468;
    let (era, day_of_era) = (from_march_0 / 146_097, from_march_0 % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before(year: u64) -> u64 {
    let leaps = |y: u64| y / 4 - y / 100 + y / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, format: &str) -> String {
        strftime(format, SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn known_days() {
        // From `date -u -d @… +…`.
        assert_eq!(at(0, "%a %d %b %Y %H:%M:%S"), "Thu 01 Jan 1970 00:00:00");
        assert_eq!(at(951_782_399, "%F %T %j"), "2000-02-28 23:59:59 059");
        assert_eq!(at(951_827_696, "%A, %B %e, %Y"), "Tuesday, February 29, 2000");
        assert_eq!(at(1_735_689_599, "%j %y %I:%M %p"), "366 24 11:59 PM");
        assert_eq!(at(1_751_328_000, "%d %b %Y|%-d.%-m.|%I %p|%%|%Q|%"), "01 Jul 2025|1.7.|12 AM|%|%Q|%");
        assert_eq!(at(4_102_444_800, "%F %j"), "2100-01-01 001");
    }
}
