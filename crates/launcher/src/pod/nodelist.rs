//! Slurm's way to write hosts: `gpu[01-03,7],login`.

use super::surroundings::PODS_MOST;

/// The hosts of a list, in order.
///
/// # Errors
/// What is wrong with it, in words that follow its name.
pub fn expand(list: &str) -> Result<Vec<String>, String> {
    let mut hosts = Vec::new();
    for entry in entries(list)? {
        expand_entry(entry, &mut hosts)?;
    }
    Ok(hosts)
}

/// Splits at the commas outside brackets.
fn entries(list: &str) -> Result<Vec<&str>, String> {
    let (mut entries, mut start, mut depth) = (Vec::new(), 0, 0u32);
    for (at, c) in list.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1).ok_or_else(|| format!("`{list}` has a bracket too many"))?,
            ',' if depth == 0 => {
                entries.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if depth > 0 {
        return Err(format!("`{list}` has a bracket that does not end"));
    }
    entries.push(&list[start..]);
    Ok(entries.into_iter().filter(|entry| !entry.is_empty()).collect())
}

/// The last brackets vary fastest, as in Slurm.
fn expand_entry(entry: &str, hosts: &mut Vec<String>) -> Result<(), String> {
    let Some((before, rest)) = entry.split_once('[') else {
        hosts.push(entry.to_owned());
        return within_limit(hosts);
    };
    let (ranges, after) =
        rest.split_once(']').ok_or_else(|| format!("`{entry}` has a bracket that does not end"))?;
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| {
            text.parse::<u32>().map_err(|_| format!("`{entry}` has `{range}` for a range of numbers"))
        };
        // Leading zeros are part of the names; ten digits hold any number.
        let width = first.len().min(10);
        for number in number(first)?..=number(last)? {
            expand_entry(&format!("{before}{number:0width$}{after}"), hosts)?;
        }
    }
    Ok(())
}

fn within_limit(hosts: &[String]) -> Result<(), String> {
    let too_many = hosts.len() > PODS_MOST as usize;
    if too_many { Err(format!("it has more than {PODS_MOST} hosts")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_hosts_expand_in_order() {
        for (list, hosts) in [
            ("a", &["a"][..]),
            ("a,b", &["a", "b"]),
            ("n[1-3]", &["n1", "n2", "n3"]),
            ("n[08-10,3],x", &["n08", "n09", "n10", "n3", "x"]),
            ("r[1-2]n[0-1]-ib", &["r1n0-ib", "r1n1-ib", "r2n0-ib", "r2n1-ib"]),
        ] {
            assert_eq!(expand(list).expect(list), hosts, "{list}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused_and_no_list_is_endless() {
        for list in ["n[1-2", "n1-2]", "n[a-b]", "n[]", "n[0-4294967295]", "n[1-9999]x[1-9999]"] {
            assert!(expand(list).is_err(), "{list}");
        }
    }
}
