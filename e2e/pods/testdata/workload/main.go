// Command workload is the workload of the tests of pods: servers and clients that need no library.
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
}

func run(what string, arguments []string) error {
	switch {
	case what == "echo" && len(arguments) == 1:
		return echo(arguments[0])
	case what == "try" && len(arguments) == 3:
		return try(arguments[0], arguments[1], arguments[2])
	case what == "job" && len(arguments) == 1:
		return job(arguments[0])
	}
	return fmt.Errorf("unknown: %s %q", what, arguments)
}

// echo returns the bytes that it receives.
func echo(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			io.Copy(conn, conn)
		}()
	}
}

// try connects to target and sends the result to report, under a name.
func try(report, name, target string) error {
	outcome := "connected"
	conn, err := dial(target)
	if errors.Is(err, syscall.ECONNREFUSED) {
		outcome = "refused"
	} else if err != nil {
		outcome = err.Error()
	} else {
		conn.Close()
	}
	told, err := dial(report)
	if err != nil {
		return err
	}
	defer told.Close()
	_, err = fmt.Fprintf(told, "%s: %s\n", name, outcome)
	return err
}

// dial retries while there is no answer: a pod's network may need a moment on a node that starts and ends others.
func dial(address string) (conn net.Conn, err error) {
	for range 10 {
		conn, err = net.DialTimeout("tcp", address, 2*time.Second)
		if slow := net.Error(nil); !errors.As(err, &slow) || !slow.Timeout() {
			break
		}
	}
	return conn, err
}

// job waits for its sidecar, sends one request, and ends the sidecar.
func job(url string) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		response, err := http.Get("http://127.0.0.1:15021/healthz/ready")
		if err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				break
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the sidecar does not become ready: %v", err)
		}
	}
	response, err := http.Get(url)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	response, err = http.Post("http://127.0.0.1:15020/quitquitquit", "", nil)
	if err != nil {
		return err
	}
	return response.Body.Close()
}
