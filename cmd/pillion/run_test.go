package main

import "testing"

func TestTheLivePageOfARunIsOnLoopbackOnly(t *testing.T) {
	for text, valid := range map[string]bool{
		"127.0.0.1:0": true, "127.1.2.3:80": true, "[::1]:8080": true, "localhost:0": true,
		":8080": false, "0.0.0.0:8080": false, "[::]:8080": false, "198.51.100.1:80": false, "page.example:80": false, "127.0.0.1": false, "8080": false,
	} {
		if got, err := parseUI(text); (err == nil) != valid || valid && got != text {
			t.Errorf("--ui %s: %q, %v", text, got, err)
		}
	}
}
