package iptables

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// lockName is an abstract Unix socket. Its name is local to the network namespace, needs no file, and is released by
// the kernel when the holder exits.
const lockName = "@pillion/rules"

const lockTimeout = 30 * time.Second

// Lock prevents other runs of pillion from changing the rules of this network namespace until release is called.
// Otherwise two concurrent runs would plan from a state that the other is about to change. It waits up to lockTimeout
// for its turn.
func Lock(ctx context.Context) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	for {
		listener, err := new(net.ListenConfig).Listen(ctx, "unix", lockName)
		if err == nil {
			return func() { listener.Close() }, nil
		}
		if errors.Is(err, unix.EADDRINUSE) {
			err = awaitRelease(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("waiting for another run of pillion in this network namespace: %w", err)
		}
	}
}

// awaitRelease returns when the holder of the lock closes it. The holder never accepts, so our connection waits in its
// queue and is reset when the socket closes.
func awaitRelease(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", lockName)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil // released between Listen and Dial
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	conn.Read(make([]byte, 1))
	return ctx.Err()
}
