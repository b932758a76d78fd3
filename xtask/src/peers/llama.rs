//! llama.cpp: built natively from its Python source package, and the model files made with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{find, logged, output};
use crate::machine;

/// The package that carries llama.cpp's source, and its version.
const SOURCE: (&str, &str) = ("llama-cpp-python", "0.3.36");
/// What its build needs to say what it is made of.
const BUILD_PACKAGES: [&str; 1] = ["scikit-build-core==1.1.2"];
const PROGRAMS: [&str; 4] = ["llama-bench", "llama-server", "llama-quantize", "llama-completion"];

/// A finished build.
pub(crate) struct Llama {
    /// Folder of the programs.
    pub(crate) bin: PathBuf,
    /// What it says it is, with the package that it came from.
    pub(crate) version: String,
}

/// Builds llama.cpp under `work`, or takes the build in `given`.
pub(crate) fn set_up(work: &Path, given: Option<&Path>) -> Result<Llama> {
    let bin = match given {
        Some(folder) if folder.join("bin").is_dir() => folder.join("bin"),
        Some(folder) => folder.to_owned(),
        None => build(work)?,
    };
    for program in PROGRAMS {
        if !bin.join(program).is_file() {
            bail!("{} has no {program}; build it there or leave --build-dir out", bin.display());
        }
    }
    let said = Command::new(bin.join("llama-server")).arg("--version").output()?;
    let text = [said.stdout, said.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|l| l.strip_prefix("version: ")).unwrap_or("unknown version");
    let version = match given {
        None => format!("{line}, from {} {}", SOURCE.0, SOURCE.1),
        Some(_) => line.to_owned(),
    };
    Ok(Llama { bin, version })
}

fn build(work: &Path) -> Result<PathBuf> {
    let folder = work.join(format!("llama.cpp-{}", SOURCE.1));
    let bin = folder.join("bin");
    if PROGRAMS.iter().all(|program| bin.join(program).is_file()) {
        return Ok(bin);
    }
    let missing: Vec<&str> = [("cmake", "cmake"), ("ninja", "ninja-build"), ("g++", "g++")]
        .into_iter()
        .filter_map(|(program, package)| find(program).is_none().then_some(package))
        .collect();
    machine::install(&missing, work)?;
    let source = source(work)?;
    println!("xtask: building llama.cpp (about six minutes on two cores)");
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(&source).arg("-B").arg(&folder).args(["-G", "Ninja"]).args([
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_BUILD_NUMBER=0",
        "-DLLAMA_BUILD_COMMIT=vendored",
    ]);
    logged(&mut configure, &work.join("llama-configure.log"))?;
    let mut compile = Command::new("cmake");
    compile.arg("--build").arg(&folder).arg("--target").args(PROGRAMS);
    logged(&mut compile, &work.join("llama-build.log"))?;
    Ok(bin)
}

/// llama.cpp's source folder inside the unpacked package.
fn source(work: &Path) -> Result<PathBuf> {
    let name = SOURCE.0.replace('-', "_");
    let folder = work.join(format!("{name}-{}", SOURCE.1));
    if !folder.join("vendor/llama.cpp/CMakeLists.txt").is_file() {
        let python = machine::python(work, "peers", &BUILD_PACKAGES)?;
        println!("xtask: fetching {}=={}", SOURCE.0, SOURCE.1);
        let mut download = Command::new(python);
        download.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check"]);
        download.args(["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest"]).arg(work);
        download.arg(format!("{}=={}", SOURCE.0, SOURCE.1));
        logged(&mut download, &work.join("pip-download.log"))?;
        let archive = work.join(format!("{name}-{}.tar.gz", SOURCE.1));
        let mut unpack = Command::new("tar");
        logged(unpack.arg("xzf").arg(&archive).arg("-C").arg(work), &work.join("tar.log"))?;
    }
    Ok(folder.join("vendor/llama.cpp"))
}

/// A model file both sides run.
#[derive(Clone, Debug)]
pub(crate) struct ModelFile {
    pub(crate) label: String,
    pub(crate) path: PathBuf,
}

/// The files by short name (`q4_1`, `q4_0`, `q8_0`, `q4_k_m`, `bf16`, `gemma`): fetched with our own binary, the
/// other quantizations made from the first with llama-quantize. That loses quality; it doesn't change speed.
pub(crate) fn models(
    work: &Path,
    consort: &Path,
    llama: &Llama,
    wanted: &[String],
) -> Result<Vec<ModelFile>> {
    let home = work.join("consort");
    let mut files = Vec::new();
    for name in wanted {
        let file = match name.as_str() {
            "q4_1" => ModelFile {
                label: "SmolLM2-135M Q4_1".into(),
                path: pull(consort, &home, "smollm2-135m-instruct")?,
            },
            "gemma" => {
                ModelFile { label: "Gemma-3-270M Q4_K_M".into(), path: pull(consort, &home, "gemma-3-270m")? }
            }
            "q4_0" | "q8_0" | "q4_k_m" | "bf16" => {
                let path = work.join(format!("smollm2-135m-{name}.gguf"));
                if !path.is_file() {
                    let first = pull(consort, &home, "smollm2-135m-instruct")?;
                    let wide = work.join("smollm2-135m-f16.gguf");
                    quantize(llama, &first, &wide, "F16", work)?;
                    quantize(llama, &wide, &path, &name.to_uppercase(), work)?;
                }
                ModelFile { label: format!("SmolLM2-135M {}", name.to_uppercase()), path }
            }
            other => {
                bail!("no model file is called {other}; there are q4_1, q4_0, q8_0, q4_k_m, bf16 and gemma")
            }
        };
        files.push(file);
    }
    Ok(files)
}

fn pull(consort: &Path, home: &Path, model: &str) -> Result<PathBuf> {
    let json = output(Command::new(consort).env("CONSORT_HOME", home).args(["pull", model, "--json"]))?;
    let answer: serde_json::Value = serde_json::from_str(&json)
        .with_context(|| format!("`consort pull {model} --json` printed {json:?}"))?;
    Ok(answer["path"].as_str().with_context(|| format!("no path in {answer}"))?.into())
}

fn quantize(llama: &Llama, from: &Path, to: &Path, kind: &str, work: &Path) -> Result<()> {
    if to.is_file() {
        return Ok(());
    }
    let part = to.with_extension("part");
    let mut command = Command::new(llama.bin.join("llama-quantize"));
    command.arg("--allow-requantize").arg(from).arg(&part).arg(kind);
    logged(&mut command, &work.join(format!("quantize-{}.log", kind.to_lowercase())))?;
    fs::rename(&part, to).with_context(|| format!("cannot name {}", to.display()))
}
