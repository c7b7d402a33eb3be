"""Weights by broadcast: gloo between three members on this machine."""

import threading
import time

import pytest
import torch

from consilience.conf.errors import WeightsRefused
from consilience.rollout import weight_broadcast
from consilience.rollout.publishing import announce, verify
from consilience.rollout.weight_broadcast import BroadcastBroken, BroadcastGroup, GroupAddress, open_store
from consilience.rollout.weight_transport import WeightReceiver

torch.set_num_threads(1)


def weights(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(300, 70, generator=g),
        "b": torch.randn(3, generator=g).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "table": torch.arange(5),
    }


class Members:
    """Inboxes in threads, and the group of rank 0."""

    def __init__(self, num, timeout_s=20.0, num_coming=None):
        store = open_store(timeout_s)
        self.address = GroupAddress("127.0.0.1", store.port, num + 1, "gloo", timeout_s)
        self.inboxes = [WeightReceiver() for _ in range(num)]
        self.answers = [None] * num
        coming = range(num if num_coming is None else num_coming)
        self.start(lambda i: self.inboxes[i].join(self.address, i + 1), coming)
        self.group = BroadcastGroup(self.address, 0, store)
        self.wait()

    def start(self, work, which):
        def run(i):
            try:
                self.answers[i] = work(i)
            except Exception as error:
                self.answers[i] = error

        self.threads = [threading.Thread(target=run, args=(i,)) for i in which]
        for thread in self.threads:
            thread.start()

    def wait(self):
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("bucket_bytes", [1, 1000, 64 << 20])
def test_every_member_gets_every_version(monkeypatch, bucket_bytes):
    monkeypatch.setattr(weight_broadcast, "BUCKET_BYTES", bucket_bytes)
    members = Members(2)
    for version in range(3):
        publication = announce(weights(version), version)
        members.start(lambda i, p=publication: members.inboxes[i].open(members.address, p), range(2))
        members.group.send(weights(version), publication)
        members.wait()
        for answer in members.answers:
            verify(answer, publication)


def test_weights_that_do_not_fit_are_refused_before_a_byte_is_sent():
    members = Members(1)
    publication = announce(weights(0), 0)
    with pytest.raises(WeightsRefused, match="tensor w: found"):
        members.group.send({**weights(0), "w": torch.zeros(2)}, publication)
    members.start(lambda i: members.inboxes[i].open(members.address, publication), range(1))
    members.group.send(weights(0), publication)  # the group is as it was
    members.wait()
    verify(members.answers[0], publication)


def test_a_member_that_never_comes_or_never_listens_is_an_error_within_the_limit():
    began = time.monotonic()
    with pytest.raises(BroadcastBroken, match="did not form"):
        Members(2, timeout_s=1.0, num_coming=1)
    members = Members(1, timeout_s=1.0)
    with pytest.raises(BroadcastBroken, match="broke off"):
        members.inboxes[0].open(members.address, announce(weights(0), 0))  # rank 0 sends nothing
    assert time.monotonic() - began < 20
