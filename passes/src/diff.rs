//! Differences between two texts, line by line, in the unified format: for people who follow what a pass did.

use similar::TextDiff;

/// The unified diff of two texts with three lines of context, headed by their names; empty if they are equal.
pub fn lines(a: &str, b: &str, from: &str, to: &str) -> String {
    if a == b {
        return String::new();
    }
    TextDiff::from_lines(a, b).unified_diff().context_radius(3).header(from, to).to_string()
}

#[cfg(test)]
mod tests {
    use super::lines;

    #[test]
    fn equal_texts_have_no_diff() {
        assert_eq!(lines("a\nb\n", "a\nb\n", "x", "y"), "");
    }

    #[test]
    fn a_changed_line_with_context() {
        let diff = lines("1\n2\n3\n4\n5\n6\n7\n8\n9\n", "1\n2\n3\n4\nfive\n6\n7\n8\n9\n", "before", "after");
        assert_eq!(diff, "--- before\n+++ after\n@@ -2,7 +2,7 @@\n 2\n 3\n 4\n-5\n+five\n 6\n 7\n 8\n");
    }
}
