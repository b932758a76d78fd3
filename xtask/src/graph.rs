//! Holds the crates to the house drawing in ARCHITECTURE.md: a crate uses only crates of floors below its own.
//!
//! The drawing is the table there; nothing is repeated here, so a crate that isn't drawn, or is drawn and gone, fails too.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::command::{cargo, output};

/// Crates that may hold `unsafe`.
const MAY_BE_UNSAFE: [&str; 2] = ["tensor", "collectives"];
/// Packages that may use `anyhow`: libraries have error types a caller can act on.
const MAY_USE_ANYHOW: [&str; 2] = ["consort", "xtask"];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
}

/// Checks the workspace; returns how many crates it has.
pub(crate) fn check(root: &Path) -> Result<usize> {
    let drawing = root.join("ARCHITECTURE.md");
    let text = fs::read_to_string(&drawing).with_context(|| format!("cannot read {}", drawing.display()))?;
    let floors = floors(&text)?;
    let json = output(&mut cargo(root, ["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Metadata = serde_json::from_str(&json)?;
    let mut wrong = against(&floors, &metadata.packages);
    for package in &metadata.packages {
        wrong.extend(unsafe_code(package)?);
    }
    if !wrong.is_empty() {
        bail!("the crates are not as ARCHITECTURE.md draws them:\n  {}", wrong.join("\n  "));
    }
    Ok(floors.len())
}

/// The table's rows that begin with a floor and a crate: `| 3 | `model` | …`.
fn floors(text: &str) -> Result<BTreeMap<String, u32>> {
    let mut floors = BTreeMap::new();
    for line in text.lines() {
        let mut cells = line.split('|').map(str::trim).skip(1);
        let (Some(floor), Some(name)) = (cells.next(), cells.next()) else { continue };
        let (Ok(floor), Some(name)) =
            (floor.parse(), name.strip_prefix('`').and_then(|n| n.strip_suffix('`')))
        else {
            continue;
        };
        floors.insert(name.to_owned(), floor);
    }
    if floors.is_empty() {
        bail!("ARCHITECTURE.md has no table of floors (rows such as: | 3 | `model` | …)");
    }
    Ok(floors)
}

fn short(package: &str) -> &str {
    package.strip_prefix("consort-").unwrap_or(package)
}

fn against(floors: &BTreeMap<String, u32>, packages: &[Package]) -> Vec<String> {
    let mut wrong = Vec::new();
    for name in floors.keys().filter(|name| !packages.iter().any(|p| short(&p.name) == **name)) {
        wrong.push(format!("{name} is drawn and doesn't exist"));
    }
    for package in packages {
        for dependency in &package.dependencies {
            if dependency.name == "anyhow" && !MAY_USE_ANYHOW.contains(&package.name.as_str()) {
                wrong.push(format!("{} uses anyhow; a library has its own error type", package.name));
            }
        }
        if package.name == "xtask" {
            continue;
        }
        let name = short(&package.name);
        let Some(floor) = floors.get(name) else {
            wrong.push(format!("{name} exists and isn't drawn"));
            continue;
        };
        for dependency in &package.dependencies {
            let uses = short(&dependency.name);
            // A crate may test itself through its own public face.
            if uses == name && dependency.kind.as_deref() == Some("dev") {
                continue;
            }
            let Some(below) = floors.get(uses) else { continue };
            if below >= floor {
                wrong.push(format!("{name} (floor {floor}) uses {uses} (floor {below})"));
            }
        }
    }
    wrong
}

/// Each crate takes the workspace's lints, which forbid `unsafe`, but for those that may have it.
fn unsafe_code(package: &Package) -> Result<Option<String>> {
    let manifest = fs::read_to_string(&package.manifest_path)?;
    let forbids = manifest.split("[lints]").nth(1).is_some_and(|rest| {
        rest.trim_start().lines().next().is_some_and(|line| line.replace(' ', "") == "workspace=true")
    });
    if forbids || MAY_BE_UNSAFE.contains(&short(&package.name)) {
        return Ok(None);
    }
    Ok(Some(format!("{} must take the workspace's lints ([lints] workspace = true)", package.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_as_drawn() {
        let crates = check(&crate::root()).unwrap();
        assert!(crates >= 9, "only {crates} crates are drawn");
    }

    fn package(name: &str, uses: &[(&str, Option<&str>)]) -> Package {
        let dependencies =
            uses.iter().map(|(n, k)| Dependency { name: (*n).into(), kind: k.map(Into::into) }).collect();
        Package { name: name.into(), manifest_path: String::new(), dependencies }
    }

    #[test]
    fn a_crate_that_uses_its_own_floor_is_named() {
        let floors = floors("| 0 | `base` | x |\n| 2 | `tensor` | y |\n| 2 | `api` | z |\n").unwrap();
        let good = [
            package("consort-base", &[]),
            package("consort-tensor", &[("consort-base", None), ("consort-tensor", Some("dev"))]),
            package("consort-api", &[]),
            package("xtask", &[("anyhow", None)]),
        ];
        assert_eq!(against(&floors, &good), Vec::<String>::new());
        let bad = [
            package("consort-base", &[("consort-api", Some("dev"))]),
            package("consort-tensor", &[("consort-api", None), ("anyhow", None)]),
            package("consort-extra", &[]),
        ];
        assert_eq!(
            against(&floors, &bad),
            [
                "api is drawn and doesn't exist",
                "base (floor 0) uses api (floor 2)",
                "consort-tensor uses anyhow; a library has its own error type",
                "tensor (floor 2) uses api (floor 2)",
                "extra exists and isn't drawn",
            ]
        );
    }
}
