//! What a pipeline's `quantize` will make of each linear: what the searches before it ask.

use awqc_ir::{Group, Quant, Region};

use crate::analysis::linears::{LinearUse, label};
use crate::facts::Facts;
use crate::pass::PassError;
use crate::quantize::GroupOption;

/// The quantization that a pipeline asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// The same for every linear.
    Uniform(Quant),
    /// Each linear has a width of its own: [`Facts::widths`].
    Mixed {
        /// Codes around 0, without zero points.
        symmetric: bool,
        /// Elements of a row that share a scale.
        group: Group,
    },
}

impl Scheme {
    /// Elements of a row that share a scale.
    pub fn group(self) -> Group {
        match self {
            Scheme::Uniform(quant) => quant.group,
            Scheme::Mixed { group, .. } => group,
        }
    }

    /// The quantization of a weight, given the linears that use it.
    ///
    /// # Errors
    /// When widths are mixed and nobody has allocated one for it.
    pub fn of(self, region: &Region, uses: &[LinearUse], facts: &Facts) -> Result<Quant, PassError> {
        let (symmetric, group) = match self {
            Scheme::Uniform(quant) => return Ok(quant),
            Scheme::Mixed { symmetric, group } => (symmetric, group),
        };
        let mut widths = uses.iter().map(|l| facts.widths.get(&l.input).copied());
        match widths.next().flatten() {
            Some(bits) if widths.all(|w| w == Some(bits)) => Ok(Quant { bits, symmetric, group }),
            Some(_) | None => {
                let name = uses.first().map(|l| label(region, l.weight)).unwrap_or_default();
                Err(PassError::Refused(format!(
                    "no width was allocated for `{name}`: a mean of bits is spread over the whole model first, which \
                     `awqc compile` does where `profile` comes before the passes that quantize; or give bits=2, 3, 4 or 8"
                )))
            }
        }
    }

    /// What a search looks for: the pipeline's scheme, but for what the search's own options say.
    pub(crate) fn searched(scheme: Option<Self>, bits: Option<u8>, group: Option<GroupOption>) -> Option<Self> {
        let (width, symmetric, own) = match scheme {
            Some(Scheme::Uniform(quant)) => (Some(quant.bits), quant.symmetric, quant.group),
            Some(Scheme::Mixed { symmetric, group }) => (None, symmetric, group),
            None => (None, false, GroupOption::default().0),
        };
        let group = group.map_or(own, |g| g.0);
        match bits.or(width) {
            Some(bits) => Some(Scheme::Uniform(Quant { bits, symmetric, group })),
            None => scheme.map(|_| Scheme::Mixed { symmetric, group }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_a_search_come_before_the_scheme() {
        let uniform = |text: &str| Some(Scheme::Uniform(text.parse().unwrap()));
        let mixed = Some(Scheme::Mixed { symmetric: true, group: Group::Row });
        let group = Some(GroupOption(Group::Size(32)));
        assert_eq!(Scheme::searched(None, None, group), None);
        assert_eq!(Scheme::searched(None, Some(3), None), uniform("u3g128"));
        assert_eq!(Scheme::searched(uniform("i4g64"), None, None), uniform("i4g64"));
        assert_eq!(Scheme::searched(uniform("i4g64"), Some(2), group), uniform("i2g32"));
        assert_eq!(Scheme::searched(mixed, None, None), mixed);
        assert_eq!(
            Scheme::searched(mixed, None, group),
            Some(Scheme::Mixed { symmetric: true, group: Group::Size(32) })
        );
        assert_eq!(Scheme::searched(mixed, Some(8), None), uniform("i8row"));
    }
}
