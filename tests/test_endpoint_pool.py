"""Several servers as one: shared out, dropped when they die, checked when they come back."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.errors import UserError
from vlm_distill import endpoint_pool
from vlm_distill.endpoint import Endpoint, Refused, Unreachable
from vlm_distill.endpoint_pool import EndpointPool, open_endpoint

KEY = "OPENAI_API_KEY"


class Named(ThreadingHTTPServer):
    """A server that answers with its name, or with a status."""

    allow_reuse_address = True

    def __init__(self, name, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.name, self.status, self.asked = name, 200, 0
        self.holds = threading.Event()
        self.holds.set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def die(self):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        self.server.holds.wait(10)
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(f'"{self.server.name}"'.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def servers():
    servers = [Named("one"), Named("two")]
    yield servers
    for server in servers:
        server.die()


def pool_of(servers, retries=0):
    members = [Endpoint("teacher.server", server.url, KEY, wait=0.001, timeout=5) for server in servers]
    return EndpointPool(members, retries)


def ask(pool):
    return pool.ask("name", None, str)


@pytest.fixture
def no_rest(monkeypatch):
    monkeypatch.setattr(endpoint_pool, "_REST", 0.0)


def test_requests_go_to_the_least_busy_server(servers):
    pool = pool_of(servers)
    servers[0].holds.clear()
    waiting = threading.Thread(target=ask, args=(pool,))
    waiting.start()
    while not servers[0].asked:
        pass
    assert [ask(pool) for _ in range(3)] == ["two"] * 3
    servers[0].holds.set()
    waiting.join()
    assert ask(pool) == "one"


def test_a_dead_server_is_left_out_with_one_warning(servers, capsys):
    pool = pool_of(servers)
    servers[0].die()
    assert [ask(pool) for _ in range(4)] == ["two"] * 4
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(
        f"vlm-distill: teacher.server: {servers[0].url} does not answer and is left out until it does"
    )


def test_it_is_used_again_once_it_answers(servers, capsys, no_rest):
    pool = pool_of(servers)
    servers[0].die()
    assert ask(pool) == "two"
    servers[0] = Named("one", servers[0].server_port)
    assert ask(pool) == "one"
    assert capsys.readouterr().err.endswith(f"teacher.server: {servers[0].url} answers again\n")


def test_it_is_checked_before_it_is_used_again(servers, no_rest):
    pool = pool_of(servers)

    def check(server):
        if ask(server) == "another":
            raise UserError(f"{server.url} serves another model")

    pool.check_each(check)
    servers[0].die()
    assert ask(pool.above("/v1")) == "two"
    servers[0] = Named("another", servers[0].server_port)
    with pytest.raises(UserError, match=f"{servers[0].url} serves another model"):
        ask(pool.above("/v1"))


def test_a_server_that_is_dead_at_the_start_joins_later(servers, no_rest):
    servers[0].die()
    pool, checked = pool_of(servers), []
    pool.check_each(lambda server: checked.append(ask(server)))
    assert checked == ["two"]
    servers[0] = Named("one", servers[0].server_port)
    assert ask(pool) == "one"
    assert checked == ["two", "one"]


def test_none_that_answers_ends_the_request(servers):
    pool = pool_of(servers, retries=1)
    for server in servers:
        server.die()
    with pytest.raises(Unreachable, match="did not answer"):
        ask(pool)
    with pytest.raises(Unreachable, match="did not answer"):
        pool_of(servers).check_each(ask)


def test_a_busy_server_is_asked_again_after_the_others(servers):
    pool = pool_of(servers)
    servers[0].status = 503
    assert ask(pool) == "two"
    servers[1].status = 503
    with pytest.raises(Refused, match="503"):
        ask(pool)
    servers[0].status = servers[1].status = 200
    assert ask(pool) == "one"  # neither was dropped


def test_a_refusal_is_not_repeated_elsewhere(servers):
    servers[0].status = 400
    with pytest.raises(Refused, match="400"):
        ask(pool_of(servers))
    assert servers[1].asked == 0


def test_one_address_is_a_plain_server():
    assert isinstance(open_endpoint("teacher.server", "http://127.0.0.1:9/v1", KEY, timeout=1), Endpoint)
    with pytest.raises(UserError, match="is not an address"):
        open_endpoint("teacher.server", ["http://127.0.0.1:9/v1", "two"], KEY, timeout=1)
