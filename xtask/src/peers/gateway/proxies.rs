//! The upstream and the proxies before it: how each is configured and started.
//!
//! All are what a careful operator would run on one core: one worker, connections to the upstream kept open, no access
//! log. LiteLLM runs with its default server and one worker.

use std::ffi::OsStr;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{find, output};
use crate::replica::Replica;

/// What people use to put many models behind one address.
pub(super) const LITELLM: &str = "litellm[proxy]==1.106.2";

/// Which processor core has what.
pub(super) struct Cores {
    pub(super) proxy: usize,
    pub(super) load: usize,
    upstream: usize,
}

/// A server with a fixed answer, twice: as anybody's OpenAI server, and as a Consort replica that streams nine tokens.
pub(super) struct Upstream {
    pub(super) plain: SocketAddr,
    pub(super) replica: SocketAddr,
    _server: Replica,
}

/// A proxy that runs.
pub(super) struct Proxy {
    pub(super) name: &'static str,
    pub(super) version: String,
    pub(super) address: SocketAddr,
    _server: Replica,
}

/// Where a program is; system services lie outside of a user's path.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let system = ["/usr/sbin", "/usr/local/sbin"].into_iter().map(|folder| Path::new(folder).join(name));
    find(name).or_else(|| system.into_iter().find(|path| path.is_file()))
}

impl Cores {
    pub(super) fn of_this_machine() -> Result<Cores> {
        match std::thread::available_parallelism()?.get() {
            1 => bail!("this needs two processor cores: one for the proxy, one for the load"),
            2 => Ok(Cores { proxy: 0, load: 1, upstream: 1 }),
            _ => Ok(Cores { proxy: 0, load: 1, upstream: 2 }),
        }
    }

    /// A command on one core.
    pub(super) fn pinned(&self, core: usize, command: impl AsRef<OsStr>) -> Command {
        let mut pinned = Command::new("taskset");
        pinned.args(["-c", &core.to_string()]).arg(command);
        pinned
    }

    pub(super) fn shared(&self) -> bool {
        self.load == self.upstream
    }
}

fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn installed(name: &str) -> Result<PathBuf> {
    program(name).with_context(|| format!("{name} is not installed"))
}

pub(super) const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hello! How can I help you today?"},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":18,"completion_tokens":9,"total_tokens":27}}"#;

/// The same answer as a replica of ours gives it to a gateway.
fn stream() -> String {
    let chunk = |rest: &str| {
        format!(
            r#"data: {{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m","system_fingerprint":"fp","choices":[{rest}"#
        )
    };
    let mut text = chunk(
        r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}"#,
    );
    let words = ["Hello", "!", " How", " can", " I", " help", " you", " today", "?"];
    for (i, word) in words.iter().enumerate() {
        let reason = if i + 1 == words.len() { "\"stop\"" } else { "null" };
        text += "\\n\\n";
        text += &chunk(&format!(
            r#"{{"index":0,"delta":{{"content":"{word}"}},"logprobs":null,"finish_reason":{reason},"token_ids":[{}]}}],"usage":null}}"#,
            100 + i
        ));
    }
    text += "\\n\\n";
    text += &chunk(r#"],"usage":{"prompt_tokens":18,"completion_tokens":9,"total_tokens":27}}"#);
    text + "\\n\\ndata: [DONE]\\n\\n"
}

/// nginx's settings around what a server does.
fn nginx(work: &Path, name: &str, http: &str) -> Result<PathBuf> {
    let folder = work.join(name);
    fs::create_dir_all(&folder)?;
    let at = folder.display();
    let text = format!(
        "worker_processes 1;\ndaemon off;\npid {at}/nginx.pid;\nerror_log {at}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 600s;\n\
         \x20 client_body_temp_path {at}/body;\n  proxy_temp_path {at}/proxy;\n  fastcgi_temp_path {at}/fastcgi;\n\
         \x20 uwsgi_temp_path {at}/uwsgi;\n  scgi_temp_path {at}/scgi;\n{http}}}\n"
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

impl Upstream {
    pub(super) fn start(work: &Path, cores: &Cores) -> Result<Upstream> {
        let program = installed("nginx")?;
        let replica = free_port()?;
        let quoted = |text: &str| text.replace('"', "\\\"");
        let server = Replica::start("/v1/models", &work.join("upstream.log"), |plain| {
            let models = |extra: &str| {
                quoted(&format!(
                    r#"{{"object":"list","data":[{{"id":"m","object":"model","created":1,"owned_by":"nobody"{extra}}}]}}"#
                ))
            };
            let serve = |address: SocketAddr, rest: &str| {
                format!(
                    "  server {{\n    listen {address};\n    default_type application/json;\n{rest}  }}\n"
                )
            };
            let answer = quoted(ANSWER);
            let one = serve(
                plain,
                &format!(
                    "    location = /v1/chat/completions {{ return 200 \"{answer}\"; }}\n    location = /v1/models {{ return 200 \"{}\"; }}\n",
                    models("")
                ),
            );
            let two = serve(
                replica,
                &format!(
                    "    location = /v1/chat/completions {{ default_type text/event-stream; return 200 \"{}\"; }}\n\
                 \x20   location = /v1/models {{ return 200 \"{}\"; }}\n    location = /ready {{ return 200 \"{}\"; }}\n",
                    quoted(&stream()),
                    models(r#","max_model_len":4096,"system_fingerprint":"fp""#),
                    quoted(r#"{"status":"ready","model":"m","system_fingerprint":"fp"}"#)
                ),
            );
            let mut command = cores.pinned(cores.upstream, program);
            // A file that can't be written is told by nginx, which then doesn't find it.
            command.arg("-c").arg(nginx(work, "upstream", &(one + &two)).unwrap_or_default());
            command
        })?;
        Ok(Upstream { plain: server.address, replica, _server: server })
    }
}

impl Proxy {
    pub(super) fn nginx(work: &Path, cores: &Cores, upstream: &Upstream) -> Result<Proxy> {
        let program = installed("nginx")?;
        let server = Replica::start("/v1/models", &work.join("nginx.log"), |address| {
            let http = format!(
                "  upstream models {{ server {}; keepalive 128; keepalive_requests 1000000000; }}\n\
                 \x20 server {{\n    listen {address};\n    location / {{\n      proxy_pass http://models;\n\
                 \x20     proxy_http_version 1.1;\n      proxy_set_header Connection \"\";\n    }}\n  }}\n",
                upstream.plain
            );
            let mut command = cores.pinned(cores.proxy, &program);
            command.arg("-c").arg(nginx(work, "nginx", &http).unwrap_or_default());
            command
        })?;
        let version = std::process::Command::new(&program).arg("-v").output()?;
        let version = String::from_utf8_lossy(&version.stderr).trim().replace("nginx version: ", "");
        Ok(Proxy { name: "nginx", version, address: server.address, _server: server })
    }

    pub(super) fn haproxy(work: &Path, cores: &Cores, upstream: &Upstream) -> Result<Proxy> {
        let program = installed("haproxy")?;
        let path = work.join("haproxy.cfg");
        let server = Replica::start("/v1/models", &work.join("haproxy.log"), |address| {
            let text = format!(
                "global\n  nbthread 1\n  maxconn 4096\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 600s\n\
                 \x20 timeout server 600s\n  http-reuse always\nfrontend front\n  bind {address}\n  default_backend models\n\
                 backend models\n  server one {}\n",
                upstream.plain
            );
            let written = fs::write(&path, text).is_ok();
            let mut command = cores.pinned(cores.proxy, &program);
            command.arg("-f").arg(if written { path.as_path() } else { Path::new("") });
            command
        })?;
        let version = output(Command::new(&program).arg("-v"))?;
        let version = version.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
        Ok(Proxy { name: "haproxy", version, address: server.address, _server: server })
    }

    pub(super) fn consort(
        work: &Path,
        cores: &Cores,
        program: &Path,
        name: &'static str,
        upstream: SocketAddr,
    ) -> Result<Proxy> {
        let server = Replica::start("/ready", &work.join(format!("{name}.log")), |address| {
            let mut command = cores.pinned(cores.proxy, program);
            command.args(["gateway", "--json", "--upstream", &format!("http://{upstream}")]);
            command.args(["--port", &address.port().to_string()]);
            command
        })?;
        let version = output(Command::new(program).arg("--version"))?.trim().to_owned();
        Ok(Proxy { name, version, address: server.address, _server: server })
    }

    pub(super) fn litellm(work: &Path, cores: &Cores, python: &Path, upstream: &Upstream) -> Result<Proxy> {
        let config = work.join("litellm.yaml");
        fs::write(
            &config,
            format!(
                "model_list:\n  - model_name: m\n    litellm_params:\n      model: openai/m\n      api_base: http://{}/v1\n\
                 \x20     api_key: none\nlitellm_settings:\n  telemetry: false\n",
                upstream.plain
            ),
        )?;
        let program = python.with_file_name("litellm");
        let server = Replica::start("/health/liveliness", &work.join("litellm.log"), |address| {
            let mut command = cores.pinned(cores.proxy, &program);
            command.arg("--config").arg(&config).args(["--host", "127.0.0.1", "--num_workers", "1"]);
            command.args(["--port", &address.port().to_string()]);
            // Its price list comes with the package; nothing is fetched.
            command.env("LITELLM_LOCAL_MODEL_COST_MAP", "True").env("LITELLM_LOG", "ERROR");
            // No keys are checked on either side.
            command.env("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "true");
            command
        })?;
        Ok(Proxy {
            name: "litellm",
            version: LITELLM.replace("[proxy]==", " "),
            address: server.address,
            _server: server,
        })
    }
}
