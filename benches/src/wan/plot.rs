//! Bars as SVG, to be read on light and on dark pages.
//!
//! Owns the drawing: one row per bar, its value beside it, one colour for the one that matters. Leaves alone what is drawn.
//! Promises a picture that needs no font, script or file of its own, and text of others that cannot break out of it.

use std::fmt::Write as _;

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    pub label: String,
    pub value: f64,
    /// As it is written beside the bar.
    pub shown: String,
    pub look: Look,
}

/// How a bar is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// The one that matters.
    Own,
    Other,
    /// It did not end: open at its right.
    GivenUp,
    /// A heading without a bar.
    Group,
}

const WIDTH: f64 = 760.0;
const LABELS: f64 = 230.0;
const VALUES: f64 = 150.0;
const ROW: f64 = 26.0;
const BAR: f64 = 16.0;
const HEAD: f64 = 56.0;

const STYLE: &str = "\
.page{fill:#ffffff}.title{fill:#1f2328;font:600 16px sans-serif}.note{fill:#59636e;font:12px sans-serif}\
.label{fill:#1f2328;font:13px sans-serif;text-anchor:end}.group{fill:#59636e;font:600 13px sans-serif}\
.value{fill:#1f2328;font:13px sans-serif}.own{fill:#0a6cbd}.other{fill:#9aa4af}.given{fill:none;stroke:#9aa4af;stroke-dasharray:4 3}\
.axis{stroke:#d1d9e0}\
@media (prefers-color-scheme:dark){.page{fill:#0d1117}.title,.label,.value{fill:#e6edf3}.note,.group{fill:#9198a1}\
.own{fill:#58a6ff}.other{fill:#6e7681}.given{stroke:#6e7681}.axis{stroke:#3d444d}}";

/// Draws rows under a title and a note.
pub fn bars(title: &str, note: &str, rows: &[Bar]) -> String {
    let most = rows.iter().map(|row| row.value).fold(f64::MIN_POSITIVE, f64::max);
    let height = HEAD + rows.len() as f64 * ROW + 12.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>{0}</title>\n<style>{STYLE}</style>\n<rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
         <text class=\"title\" x=\"16\" y=\"24\">{0}</text>\n<text class=\"note\" x=\"16\" y=\"42\">{1}</text>\n",
        escaped(title),
        escaped(note),
    );
    for (number, row) in rows.iter().enumerate() {
        let top = HEAD + number as f64 * ROW;
        svg += &drawn(row, top, row.value.max(0.0) / most * (WIDTH - LABELS - VALUES));
    }
    let _ = writeln!(
        svg,
        "<line class=\"axis\" x1=\"{LABELS}\" x2=\"{LABELS}\" y1=\"{HEAD}\" y2=\"{:.1}\"/>\n</svg>",
        height - 12.0
    );
    svg
}

fn drawn(row: &Bar, top: f64, length: f64) -> String {
    let (label, shown) = (escaped(&row.label), escaped(&row.shown));
    let text = top + BAR - 3.0;
    let class = match row.look {
        Look::Group => return format!("<text class=\"group\" x=\"16\" y=\"{text:.1}\">{label}</text>\n"),
        Look::Own => "own",
        Look::Other => "other",
        Look::GivenUp => "given",
    };
    format!(
        "<text class=\"label\" x=\"{:.1}\" y=\"{text:.1}\">{label}</text>\
         <rect class=\"{class}\" x=\"{LABELS}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\"/>\
         <text class=\"value\" x=\"{:.1}\" y=\"{text:.1}\">{shown}</text>\n",
        LABELS - 8.0,
        length.max(1.0),
        LABELS + length + 8.0,
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(value: f64, look: Look) -> Bar {
        Bar {
            label: "a <b> & \"c\"".to_owned(),
            value,
            shown: format!("{value} s"),
            look,
        }
    }

    #[test]
    fn the_longest_bar_fills_the_room_and_names_are_only_text() {
        let svg = bars("1 < 2", "n", &[bar(50.0, Look::Own), bar(100.0, Look::GivenUp)]);
        let full = WIDTH - LABELS - VALUES;
        assert!(svg.contains(&format!("width=\"{:.1}\"", full / 2.0)), "{svg}");
        assert!(svg.contains(&format!(
            "class=\"given\" x=\"{LABELS}\" y=\"{:.1}\" width=\"{full:.1}\"",
            HEAD + ROW
        )));
        assert!(svg.contains("a &lt;b&gt; &amp; &quot;c&quot;") && !svg.contains("<b>"));
        assert!(svg.contains("prefers-color-scheme:dark") && svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn nothing_to_draw_is_no_trouble() {
        let svg = bars("t", "n", &[bar(0.0, Look::Other)]);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(bars("t", "n", &[]).ends_with("</svg>\n"));
    }
}
