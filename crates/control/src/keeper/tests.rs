//! Real processes: a shell script in the place of a replica. (It has no HTTP face, so health checks stay unanswered,
//! and a long deadline keeps them out of the way.)

use super::*;

/// A replica that reports and then waits for its standard input to end.
const GOOD: &str =
    r#"echo '{"event":"listening","address":"127.0.0.1:9"}'; echo '{"event":"ready"}'; exec cat"#;

fn launch(revision: u64) -> BTreeMap<Slot, Launch> {
    let slot = Slot { model: "m".into(), version: "stable".into(), index: 0 };
    let launch = Launch {
        model: "m".into(),
        version: "stable".into(),
        path: "/m".into(),
        stamp: String::new(),
        threads: 1,
        context: None,
        kv_bytes: None,
        max_running: 1,
        max_queued: 1,
        prefix_cache: true,
        drain_tokens: 1,
        drain_seconds: 1,
        revision,
    };
    BTreeMap::from([(slot, launch)])
}

struct Bench {
    keeper: Keeper,
    task: tokio::task::JoinHandle<()>,
    said: mpsc::UnboundedReceiver<Notice>,
    store: Arc<Store>,
    _folder: tempfile::TempDir,
}

fn bench(script: &'static str) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(folder.path()).unwrap());
    let start: Start = Box::new(move |_, _| {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", script]);
        command
    });
    let (say, said) = mpsc::unbounded_channel();
    let options = Options { probe: Duration::from_secs(3600), ..Options::default() };
    let (keeper, task) = Keeper::start(options, 1, store.clone(), start, move |notice| {
        let _ = say.send(notice);
    });
    Bench { keeper, task, said, store, _folder: folder }
}

impl Bench {
    async fn until(&self, what: impl Fn(&[SlotView]) -> bool) -> Vec<SlotView> {
        let mut view = self.keeper.watch();
        let waited = tokio::time::timeout(Duration::from_secs(30), view.wait_for(|v| what(v))).await;
        waited.unwrap_or_else(|_| panic!("{:?}", self.keeper.view())).unwrap().clone()
    }

    async fn want(&self, wanted: BTreeMap<Slot, Launch>) {
        let options = Options { probe: Duration::from_secs(3600), ..Options::default() };
        self.keeper.want(wanted, options).await;
    }
}

fn ready(view: &[SlotView]) -> bool {
    view.iter().any(|slot| slot.state == SlotState::Ready)
}

#[tokio::test]
async fn a_killed_process_is_replaced_and_stopping_leaves_none() {
    let bench = bench(GOOD);
    bench.want(launch(0)).await;
    let view = bench.until(ready).await;
    let first = view[0].replicas[0].clone();
    assert_eq!(first.id, "m-0.1");
    assert_eq!(bench.store.children().unwrap()[0].1.pid, first.pid.unwrap());
    assert_eq!(bench.keeper.kill(&first.id).await, first.pid);
    assert_eq!(bench.keeper.kill("m-0.77").await, None);
    let view = bench.until(|view| ready(view) && view[0].restarts == 1).await;
    assert_eq!(view[0].replicas[0].id, "m-0.2");
    assert!(view[0].last_failure.as_ref().unwrap().contains("signal: 9"), "{view:?}");
    let routes = bench.keeper.routes();
    assert_eq!(routes.borrow()[0].id.as_str(), "m-0.2");
    bench.keeper.stop().await;
    tokio::time::timeout(Duration::from_secs(30), bench.task).await.unwrap().unwrap();
    assert!(bench.store.children().unwrap().is_empty());
    assert_eq!(process::identity(view[0].replicas[0].pid.unwrap()), None);
}

#[tokio::test]
async fn what_a_process_said_last_is_part_of_its_report() {
    let mut bench = bench("echo first >&2; echo 'the model is damaged' >&2; exit 3");
    bench.want(launch(0)).await;
    let notice = tokio::time::timeout(Duration::from_secs(30), bench.said.recv()).await.unwrap().unwrap();
    assert!(notice.bad && notice.text.contains("exit status: 3"), "{notice:?}");
    assert!(notice.text.contains("it said: first | the model is damaged"), "{notice:?}");
    bench.keeper.stop().await;
    tokio::time::timeout(Duration::from_secs(30), bench.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_program_that_is_not_there_is_a_failure_like_any_other() {
    let mut bench = bench(GOOD);
    let start: Start = Box::new(|_, _| std::process::Command::new("/no/such/program"));
    let (say, said) = mpsc::unbounded_channel();
    let (keeper, task) = Keeper::start(Options::default(), 1, bench.store.clone(), start, move |notice| {
        let _ = say.send(notice);
    });
    (bench.keeper, bench.said) = (keeper, said);
    bench.want(launch(0)).await;
    let notice = tokio::time::timeout(Duration::from_secs(30), bench.said.recv()).await.unwrap().unwrap();
    assert!(notice.text.contains("could not be started"), "{notice:?}");
    bench.keeper.stop().await;
    tokio::time::timeout(Duration::from_secs(30), task).await.unwrap().unwrap();
    bench.task.abort();
}
