package nettest

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

func TestARefusingAddressIsOwned(t *testing.T) {
	at := Refusing(t).String()
	if conn, err := net.Dial("tcp", at); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("Dial = %v, %v", conn, err)
	}
	if listener, err := net.Listen("tcp", at); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("Listen = %v, %v", listener, err)
	}
}
