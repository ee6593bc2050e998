package e2e

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// A real sshd speaks first, in both directions, both families and both flavours of iptables. An agent that waited for
// downstream's first bytes before it dials would wait forever, because the client sends nothing.
func TestSilentClientReceivesTheServersGreeting(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{nft, legacy, native} {
		s := newStageIn(t, flavour, "--detection-hold", "1h")
		startSSHD(t, s.pod)
		startSSHD(t, s.peer)
		for _, w := range s.ways() {
			t.Run(flavour+" "+w.name, func(t *testing.T) {
				address := netip.AddrPortFrom(w.address, 2222).String()
				conn := w.dial(t, address)
				line, err := bufio.NewReader(conn).ReadString('\n')
				if err != nil || !strings.HasPrefix(line, "SSH-2.0-") {
					t.Fatalf("greeting = %q, %v", line, err)
				}
				conn.Close()
				s.agent.log.await(t, "original_destination="+address)
			})
		}
	}
}

// unprivilegedUser has a name on every system, as OpenSSH's programs require.
const unprivilegedUser = 65534

// startSSHD runs sshd on port 2222 as an ordinary user, with its own key.
func startSSHD(t *testing.T, ns *nettest.Namespace) {
	t.Helper()
	program := requireProgram(t, "sshd") // which insists on being called by its full path
	dir := userDir(t, unprivilegedUser)
	key := filepath.Join(dir, "key")
	if out, err := ns.Run(ns.Command(unprivilegedUser, unprivilegedUser, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)); err != nil {
		t.Fatalf("making a host key: %v\n%s", err, out)
	}
	config := filepath.Join(dir, "sshd_config")
	writeFile(t, config, fmt.Sprintf("Port 2222\nHostKey %s\nPidFile none\nUsePAM no\n", key))
	ns.Start(t, ns.Command(unprivilegedUser, unprivilegedUser, program, "-D", "-f", config))
	awaitListener(t, ns, 2222)
}

// userDir creates a directory for the files of a program that runs as the given user.
func userDir(t *testing.T, uid int) string {
	t.Helper()
	dir, err := os.MkdirTemp(filepath.Dir(pillion), "user-")
	if err == nil {
		err = os.Chown(dir, uid, uid)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// awaitListener waits until a program listens on port inside the namespace. It reads the kernel's table instead of
// connecting, so that the server under test sees no connection.
func awaitListener(t testing.TB, ns *nettest.Namespace, port int) {
	t.Helper()
	nettest.Eventually(t, fmt.Sprintf("port %d is open in %s", port, ns.Name), func() bool {
		return ns.MustRun(t, "ss", "-Hltn", fmt.Sprintf("sport = :%d", port)) != ""
	})
}
