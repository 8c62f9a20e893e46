//! Tables of functions of libraries that are loaded at run time.

/// Declares a table of C functions that return a status, and its loader: `functions!(Table, |symbol| error; field =
/// "symbol": fn(types); …)`. `error` says what it means that the library lacks a symbol.
macro_rules! functions {
    ($table:ident, $lacks:expr; $($field:ident = $symbol:literal : fn($($arg:ty),*);)*) => {
        /// The functions that are called.
        pub(crate) struct $table {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) -> std::ffi::c_int,)*
            // The functions are valid as long as the library stays loaded.
            _library: libloading::Library,
        }

        impl $table {
            fn find(library: libloading::Library) -> Result<Self, $crate::CudaError> {
                let lacks: fn(&str) -> $crate::CudaError = $lacks;
                Ok(Self {
                    $($field: {
                        // SAFETY: the type is that of the documented function of this name.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($arg),*) -> std::ffi::c_int>($symbol.as_bytes())
                        };
                        *found.map_err(|_| lacks($symbol))?
                    },)*
                    _library: library,
                })
            }
        }
    };
}

pub(crate) use functions;
