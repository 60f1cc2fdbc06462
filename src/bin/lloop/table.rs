//! Tables and lists of facts, as text.

/// To which side a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table with a line of titles. Columns are as wide as they must be; the last is not filled up.
pub fn table(columns: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let mut lines: Vec<Vec<String>> = vec![columns.iter().map(|(title, _)| (*title).to_owned()).collect()];
    lines.extend(rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()));
    let widths: Vec<usize> = (0..columns.len())
        .map(|at| lines.iter().filter_map(|line| line.get(at)).map(|cell| width(cell)).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).zip(columns).map(|((cell, &column), (_, align))| {
            let fill = " ".repeat(column - width(cell));
            match align {
                Align::Left => format!("{cell}{fill}"),
                Align::Right => format!("{fill}{cell}"),
            }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Facts, one a line, values below each other. A value with several lines goes on below itself.
pub fn facts(facts: &[(String, String)]) -> String {
    let column = facts.iter().map(|(name, _)| width(name)).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in facts {
        for (at, line) in value.split('\n').enumerate() {
            let name = if at == 0 { name.as_str() } else { "" };
            let fill = " ".repeat(column - width(name));
            text.push_str(format!("{name}{fill}  {}", printable(line)).trim_end());
            text.push('\n');
        }
    }
    text
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// A file may have any name: nothing in it may move the cursor, or look like another line.
pub fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let rows = [
            vec!["lloop0".into(), "64 MiB".into(), "-".into()],
            vec!["é".into(), "1 GiB".into(), "a\nb\x1b[2J".into()],
        ];
        let text = table(&[("NAME", Align::Left), ("SIZE", Align::Right), ("FILE", Align::Left)], &rows);
        assert_eq!(text, "NAME      SIZE  FILE\nlloop0  64 MiB  -\né        1 GiB  a\\nb\\u{1b}[2J\n");
        assert_eq!(table(&[("NAME", Align::Left)], &[]), "NAME\n");
    }

    #[test]
    fn values_stand_below_each_other() {
        let text = facts(&[
            ("name".into(), "x".into()),
            ("exports".into(), "one\n  two".into()),
            ("none".into(), String::new()),
        ]);
        assert_eq!(text, "name     x\nexports  one\n           two\nnone\n");
    }
}
