package e2e

import (
	"strings"
	"testing"
)

// upgrades are protocols to which real clients upgrade an HTTP/1 connection.
var upgrades = []struct{ name, request, answer string }{
	{
		"websocket",
		"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
			"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
			"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
	},
	{
		"docker attach",
		"POST /v1.41/containers/x/attach?stream=1 HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
	},
	{
		"kubectl exec",
		"POST /api/v1/namespaces/a/pods/b/exec?command=sh HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n" +
			"X-Stream-Protocol-Version: v4.channel.k8s.io\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n",
	},
	{
		"something of somebody's own",
		"GET / HTTP/1.1\r\nHost: a\r\nupgrade: own-protocol/7, other\r\nconnection: upgrade\r\n\r\n",
		"HTTP/1.1 101 \r\nconnection: upgrade\r\nupgrade: own-protocol/7\r\n\r\n",
	},
}

// After 101 the connection belongs to the new protocol: bytes pass in both directions, including those directly after the
// response, and each side ends separately.
func TestUpgrades(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		for _, u := range upgrades {
			t.Run(u.name, func(t *testing.T) {
				downstream, upstream := w.ask(t, u.request)
				asked := readMessage(t, upstream, "")
				if !carries(asked, "Upgrade", value(u.request, "Upgrade")) || !carries(asked, "Connection", "upgrade") {
					t.Errorf("the request lost its Upgrade or Connection:\n%s", asked)
				}
				writes(t, upstream, u.answer+everyByte())
				answered := readMessage(t, downstream, everyByte())
				if !strings.HasPrefix(answered, "HTTP/1.1 101 ") || !strings.HasSuffix(answered, "\r\n\r\n"+everyByte()) {
					t.Errorf("the answer is\n%q", answered)
				}
				if !carries(answered, "Upgrade", value(u.answer, "Upgrade")) || !carries(answered, "Connection", "upgrade") {
					t.Errorf("the answer lost its Upgrade or Connection:\n%s", answered)
				}
				converse(t, downstream, upstream)
				halfClose(t, downstream, upstream)
			})
		}
	})
}

// A client may send bytes of the new protocol directly after its request.
func TestBytesSentWithAnUpgradeAreNotLost(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		downstream, upstream := w.ask(t, upgrades[0].request+"first words")
		readMessage(t, upstream, "")
		writes(t, upstream, upgrades[0].answer)
		readMessage(t, downstream, "")
		reads(t, upstream, "first words")
		converse(t, downstream, upstream)
	})
}

func TestIgnoredUpgradeIsAnOrdinaryRequest(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		downstream, upstream := w.ask(t, upgrades[0].request)
		for range 3 {
			readMessage(t, upstream, "")
			answer := "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno"
			writes(t, upstream, answer)
			sameMessage(t, "the answer", readMessage(t, downstream, "no"), answer)
			writes(t, downstream, upgrades[0].request)
		}
	})
}

func TestConnectTunnelCarriesBytes(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		const request = "CONNECT some.example:443 HTTP/1.1\r\nHost: some.example:443\r\n\r\n"
		for _, answer := range []string{
			"HTTP/1.1 200 Connection established\r\n\r\n",
			"HTTP/1.1 200 OK\r\nX-Via: somebody\r\n\r\n",
		} {
			downstream, upstream := w.ask(t, request)
			sameMessage(t, "the request", readMessage(t, upstream, ""), request)
			writes(t, upstream, answer+"at once")
			sameMessage(t, "the answer", readMessage(t, downstream, "at once"), answer+"at once")
			converse(t, downstream, upstream)
			halfClose(t, upstream, downstream)
		}
	})
}

func TestRefusedConnectTunnelLeavesTheConnectionOpen(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		const request = "CONNECT some.example:443 HTTP/1.1\r\nHost: some.example:443\r\n\r\n"
		const answer = "HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno"
		downstream, upstream := w.ask(t, request)
		for range 2 {
			readMessage(t, upstream, "")
			writes(t, upstream, answer)
			sameMessage(t, "the answer", readMessage(t, downstream, "no"), answer)
			writes(t, downstream, request)
		}
	})
}

// value returns the value of a field in the head of a message, or "" without the field.
func value(message, name string) string {
	head, _, _ := strings.Cut(message, "\r\n\r\n")
	for _, line := range strings.Split(head, "\r\n")[1:] {
		if field, value, _ := strings.Cut(line, ":"); strings.EqualFold(field, name) {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// carries reports whether the value of a field contains text, in any case.
func carries(message, name, text string) bool {
	return strings.Contains(strings.ToLower(value(message, name)), strings.ToLower(text))
}
