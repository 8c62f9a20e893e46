//! Tensor names with `{i}` for a layer number.

/// A name in which `{i}` stands for one number, the same wherever it occurs; a `*` at its end stands for any rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(pub String);

/// Where the number stands.
const HOLE: &str = "{i}";

impl Pattern {
    /// Whether `name` fits; then with what number, if the pattern has `{i}`.
    pub fn matches<'n>(&self, name: &'n str) -> Option<Option<&'n str>> {
        let fits = |name: &str, pattern: &str| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == pattern,
        };
        let Some((head, tail)) = self.0.split_once(HOLE) else {
            return fits(name, &self.0).then_some(None);
        };
        let rest = name.strip_prefix(head)?;
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number = rest.get(..digits).filter(|n| !n.is_empty())?;
        fits(rest.get(digits..)?, &tail.replace(HOLE, number)).then_some(Some(number))
    }

    /// The name with `number` in place of `{i}`.
    pub fn with(&self, number: Option<&str>) -> String {
        number.map_or_else(|| self.0.clone(), |n| self.0.replace(HOLE, n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_taken_whole() {
        let p = Pattern("h.{i}.w.{i}".into());
        assert_eq!(p.matches("h.12.w.12"), Some(Some("12")));
        assert_eq!(p.matches("h.12.w.1"), None);
        assert_eq!(p.matches("h..w."), None);
        assert_eq!(p.with(Some("3")), "h.3.w.3");
        assert_eq!(Pattern("norm".into()).matches("norm"), Some(None));
        assert_eq!(Pattern("norm".into()).matches("norms"), None);
        assert_eq!(Pattern("h.{i}.*".into()).matches("h.7.w.b"), Some(Some("7")));
        assert_eq!(Pattern("h.{i}.*".into()).matches("h.7"), None);
        assert_eq!(Pattern("h.*".into()).matches("h.x"), Some(None));
    }
}
