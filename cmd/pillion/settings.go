package main

import "strings"

// settingFlag returns the flag that sets a field of the agent's configuration: --connect-timeout for ConnectTimeout.
func settingFlag(field string) string {
	flag := "-"
	for _, c := range field {
		if 'A' <= c && c <= 'Z' {
			flag += "-"
		}
		flag += string(c)
	}
	return strings.ToLower(flag)
}
