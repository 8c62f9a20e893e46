//! Every instruction set of the machine against the scalar specification, and whole programs against the executor.

mod placement;
mod products;
mod support;
