//! Every instruction set of the machine against the scalar specification.

mod products;
mod support;
