package iptables

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// lockName is an abstract socket: its name is known in one network namespace only, needs no file, and is free again as
// soon as its holder is gone.
const lockName = "@pillion/rules"

const lockTimeout = 30 * time.Second

// Lock keeps other runs of pillion from changing the rules of this network namespace until release is called. Two runs
// at once would make their plans against a state that the other is about to change. It waits for its turn.
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

// awaitRelease returns when the holder of the lock closes it. Nobody accepts the connection; that it is waiting is
// enough for it to be reset.
func awaitRelease(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", lockName)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil // just released
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
