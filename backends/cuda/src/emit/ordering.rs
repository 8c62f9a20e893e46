//! A fence: what this thread wrote to memory before it is seen by all blocks before what it writes afterwards.
//!
//! cubecl's language has none. A comment stands for it, which the generator prints where it was registered, and which
//! becomes CUDA's `__threadfence()` when the text is put in order.

/// The comment.
const WORD: &str = "fence across blocks";

/// The line that the generator's line stands for.
pub(super) fn line(line: &str) -> &str {
    if line.trim().strip_prefix("// ") == Some(WORD) { "__threadfence();" } else { line }
}

/// The fence, in kernels.
pub(crate) fn fence() {}

/// What `#[cube]` makes of a call.
pub(crate) mod fence {
    use cubecl::ir::{NonSemantic, Scope};

    pub(crate) fn expand(scope: &mut Scope) {
        scope.register(NonSemantic::Comment { content: super::WORD.into() });
    }
}
