use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tch::{Device, Kind, Tensor};

use super::{LOOPBACK, TIMEOUT, in_ranks};
use crate::{
    parallel::{Axis, Group, Layout, Mesh, Operation, Record},
    shim::c10d::{Reduction, Store},
};

fn group(store: SocketAddr, rank: usize, size: usize, timeout: Duration) -> (Group, Arc<Record>) {
    let record = Arc::new(Record::default());
    let store = Store::join(store, TIMEOUT).unwrap();
    (Group::gloo(&store, "all", (rank, size), LOOPBACK, timeout, record.clone()).unwrap(), record)
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float)).unwrap()
}

#[test]
fn collectives_are_what_they_are_called() {
    in_ranks("parallel::tests::collectives::collectives_are_what_they_are_called", 3, |[store, ..], rank| {
        let (group, record) = group(store, rank, 3, TIMEOUT);
        for kind in [Kind::Float, Kind::BFloat16] {
            // Rank r has r + 1, r + 2, r + 3.
            let own = || (Tensor::arange(3, (Kind::Float, Device::Cpu)) + (rank as f64 + 1.0)).to_kind(kind);
            let reduced = |reduction| {
                let tensor = own();
                group.all_reduce(&tensor, reduction).unwrap().wait().unwrap();
                floats(&tensor)
            };
            assert_eq!(reduced(Reduction::Sum), [6.0, 9.0, 12.0]);
            assert_eq!(reduced(Reduction::Max), [3.0, 4.0, 5.0]);
            assert_eq!(reduced(Reduction::Min), [1.0, 2.0, 3.0]);
            assert_eq!(reduced(Reduction::Mean), [2.0, 3.0, 4.0]);

            let part = Tensor::zeros([1], (kind, Device::Cpu));
            group.reduce_scatter(&part, &own(), Reduction::Sum).unwrap().wait().unwrap();
            assert_eq!(floats(&part), [[6.0], [9.0], [12.0]][rank]);

            let all = Tensor::zeros([9], (kind, Device::Cpu));
            group.all_gather(&all, &own()).unwrap().wait().unwrap();
            assert_eq!(floats(&all), [1.0, 2.0, 3.0, 2.0, 3.0, 4.0, 3.0, 4.0, 5.0]);

            let same = own();
            group.broadcast(&same, 2).unwrap().wait().unwrap();
            assert_eq!(floats(&same), [3.0, 4.0, 5.0]);
        }
        // Around the ring, under tags of their own, in both directions at once.
        let (next, before) = ((rank + 1) % 3, (rank + 2) % 3);
        let own = Tensor::from(rank as f32).view([1]);
        let [up, down] = [0, 1].map(|_| Tensor::zeros([1], (Kind::Float, Device::Cpu)));
        let sent = [group.send(&own, next, 7).unwrap(), group.send(&own, before, 8).unwrap()];
        group.receive(&down, next, 8).unwrap().wait().unwrap();
        group.receive(&up, before, 7).unwrap().wait().unwrap();
        sent.into_iter().for_each(|sent| sent.wait().unwrap());
        assert_eq!((floats(&up), floats(&down)), (vec![before as f32], vec![next as f32]));
        group.barrier().unwrap();

        let newest = record.newest();
        let last = newest.last().unwrap();
        // Twice seven before it.
        assert_eq!((last.operation, last.number, &*last.group), (Operation::Barrier, 15, "all"));
        assert_eq!(newest[0].operation, Operation::Meet);
        assert_eq!((newest[1].operation, newest[1].number, newest[1].bytes), (Operation::AllReduce, 1, 12));
        assert_eq!(record.waiting(), None);
    });
}

#[test]
fn several_are_under_way_while_the_rank_computes() {
    in_ranks("parallel::tests::collectives::several_are_under_way_while_the_rank_computes", 2, |[store, ..], rank| {
        let (group, _) = group(store, rank, 2, TIMEOUT);
        let tensors: Vec<Tensor> = (0..20).map(|_| Tensor::ones([100_000], (Kind::Float, Device::Cpu))).collect();
        let pending: Vec<_> = tensors.iter().map(|tensor| group.all_reduce(tensor, Reduction::Sum).unwrap()).collect();
        pending.into_iter().for_each(|pending| pending.wait().unwrap());
        assert!(tensors.iter().all(|tensor| tensor.min().double_value(&[]) == 2.0 && tensor.max().double_value(&[]) == 2.0));
    });
}

#[test]
fn a_member_that_is_gone_is_an_error_that_names_the_collective() {
    in_ranks(
        "parallel::tests::collectives::a_member_that_is_gone_is_an_error_that_names_the_collective",
        2,
        |[store, ..], rank| {
            let (group, _) = group(store, rank, 2, TIMEOUT);
            group.barrier().unwrap();
            if rank == 1 {
                return;
            }
            let begun = Instant::now();
            let tensor = Tensor::ones([8], (Kind::Float, Device::Cpu));
            let error = group.all_reduce(&tensor, Reduction::Sum).and_then(|pending| pending.wait()).unwrap_err();
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
            assert!(error.to_string().starts_with("all_reduce 2 of group all (32 bytes) failed: "), "{error}");
            assert!(!error.to_string().contains("frame #"), "{error}");
        },
    );
}

#[test]
fn a_member_that_does_not_come_is_seen_while_it_is_waited_for_and_ends_in_an_error() {
    in_ranks(
        "parallel::tests::collectives::a_member_that_does_not_come_is_seen_while_it_is_waited_for_and_ends_in_an_error",
        2,
        |[store, ..], rank| {
            let (group, record) = group(store, rank, 2, Duration::from_secs(2));
            if rank == 1 {
                return thread::sleep(Duration::from_secs(4));
            }
            let watch = thread::spawn(move || {
                let deadline = Instant::now() + TIMEOUT;
                loop {
                    match record.waiting() {
                        Some((collective, since)) if since > Duration::from_millis(500) => return collective,
                        _ => assert!(Instant::now() < deadline, "nothing was waited for"),
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            });
            let tensor = Tensor::ones([8], (Kind::Float, Device::Cpu));
            let error = group.all_reduce(&tensor, Reduction::Sum).and_then(|pending| pending.wait()).unwrap_err();
            assert_eq!(watch.join().unwrap(), error.collective);
            assert_eq!(error.collective.operation, Operation::AllReduce);
        },
    );
}

#[test]
fn groups_along_the_axes_hold_those_who_differ_there_alone() {
    in_ranks("parallel::tests::collectives::groups_along_the_axes_hold_those_who_differ_there_alone", 8, |[store, ..], rank| {
        let layout = Layout { data: 2, tensor: 2, pipeline: 2, ..Layout::default() };
        let store = Store::join(store, TIMEOUT).unwrap();
        let mesh = Mesh::join(&store, layout, rank, LOOPBACK, TIMEOUT, &Arc::default()).unwrap();
        let neighbours = [(Axis::Tensor, 1), (Axis::Data, 2), (Axis::Pipeline, 4)];
        for (axis, distance) in neighbours {
            let group = mesh.group(axis).unwrap();
            let sum = Tensor::from(rank as f32);
            group.all_reduce(&sum, Reduction::Sum).unwrap().wait().unwrap();
            assert_eq!(sum.double_value(&[]) as usize, rank + (rank ^ distance), "{axis:?}");
            assert_eq!((group.rank(), group.size()), (mesh.at.along(axis), 2));
        }
    });
}

#[test]
fn a_rank_alone_has_no_group() {
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let store = Store::host(listener, TIMEOUT).unwrap();
    let mesh = Mesh::join(&store, Layout::default(), 0, LOOPBACK, TIMEOUT, &Arc::default()).unwrap();
    assert!(Axis::ALL.iter().all(|&axis| mesh.group(axis).is_none()));
}
