package nft

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// A transaction is one message. Root of a user namespace may send a larger one than the default allows, but not any.
func TestATransactionFitsIntoTheBufferOfAUserNamespaceOrIsRefused(t *testing.T) {
	if !nettest.InUserNamespace(t) {
		return
	}
	text, err := os.ReadFile("/proc/sys/net/core/wmem_max")
	if err != nil {
		t.Fatal(err)
	}
	limit, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		size    int
		refused bool
	}{{100, false}, {20_000, false}, {limit, false}, {2*limit - 32, false}, {2*limit - 31, true}, {3 * limit, true}} {
		socket, err := nl.Subscribe(unix.NETLINK_NETFILTER)
		if err != nil {
			t.Fatal(err)
		}
		defer socket.Close()
		err = makeRoom(socket.GetFd(), test.size)
		if !test.refused {
			// The kernel ignores a message without a known type, but only after it has checked the size.
			if sendErr := unix.Sendto(socket.GetFd(), make([]byte, test.size), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil || sendErr != nil {
				t.Errorf("%d bytes, limit %d: %v, %v", test.size, limit, err, sendErr)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), "the kernel takes ") || !strings.Contains(err.Error(), "net.core.wmem_max") {
			t.Errorf("%d bytes, limit %d: got error %v", test.size, limit, err)
		}
	}
}
