//! Which kernels this machine can run, found once and carried as a value that can only exist where they do.

use crate::Error;

/// A family of kernels, named for the widest instructions it uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Plain Rust: the specification.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 (F, BW, VL, DQ, VNNI) and, for bf16 weights, BF16.
    Avx512,
    /// 64-bit Arm with NEON and the dot product.
    Neon,
}

/// Proof that this machine can run a family's kernels: [`Cpu::detect`] and [`Cpu::force`] are the only ways to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    family: Family,
}

impl Family {
    /// The name used in options and in the fingerprint.
    pub fn name(self) -> &'static str {
        match self {
            Family::Scalar => "scalar",
            Family::Avx2 => "avx2",
            Family::Avx512 => "avx512",
            Family::Neon => "neon",
        }
    }

    /// The family with this name.
    pub fn from_name(name: &str) -> Option<Family> {
        [Family::Scalar, Family::Avx2, Family::Avx512, Family::Neon].into_iter().find(|f| f.name() == name)
    }

    fn runs_here(self) -> bool {
        match self {
            Family::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Family::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Family::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "aarch64")]
            Family::Neon => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
}

impl Cpu {
    /// The widest family this machine runs.
    pub fn detect() -> Cpu {
        let family = [Family::Avx512, Family::Avx2, Family::Neon].into_iter().find(|f| f.runs_here());
        Cpu { family: family.unwrap_or(Family::Scalar) }
    }

    /// The named family.
    ///
    /// # Errors
    /// [`Error::FamilyUnavailable`] where the machine lacks its instructions.
    pub fn force(family: Family) -> Result<Cpu, Error> {
        if family.runs_here() {
            return Ok(Cpu { family });
        }
        let available: Vec<_> = Cpu::available().iter().map(|f| f.name()).collect();
        Err(Error::FamilyUnavailable { family: family.name(), available: available.join(", ") })
    }

    /// Every family that runs here, widest first.
    pub fn available() -> Vec<Family> {
        [Family::Avx512, Family::Avx2, Family::Neon, Family::Scalar]
            .into_iter()
            .filter(|f| f.runs_here())
            .collect()
    }

    /// The family this value stands for.
    pub fn family(self) -> Family {
        self.family
    }
}
