package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// parsed adds a flag that is parsed when it is set, so that an error names the flag or variable. *into must already have the
// value of the default text.
func parsed[T any](flags *pflag.FlagSet, into *T, parse func(string) (T, error), name, short, text, kind, usage string) *pflag.Flag {
	return flags.VarPF(&parsedValue[T]{into: into, parse: parse, text: text, kind: kind}, name, short, usage)
}

// parsedSwitch adds a boolean flag. Its default is *into; without a value it is true.
func parsedSwitch(flags *pflag.FlagSet, into *bool, name, short, usage string) {
	parsed(flags, into, parseSwitch, name, short, strconv.FormatBool(*into), "bool", usage).NoOptDefVal = "true"
}

func parseSwitch(text string) (bool, error) {
	on, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%s is not a boolean: use true or false", capture.Quoted(text))
	}
	return on, nil
}

type parsedValue[T any] struct {
	into  *T
	parse func(string) (T, error)
	text  string
	kind  string
}

func (v *parsedValue[T]) String() string { return v.text }
func (v *parsedValue[T]) Type() string   { return v.kind }

func (v *parsedValue[T]) Set(text string) error {
	value, err := v.parse(text)
	if err == nil {
		*v.into, v.text = value, text
	}
	return err
}

// flagError distinguishes an invalid value (an ordinary failure) from an invalid command line (a usage error).
// istio-iptables counts the values that it parses itself as usage errors.
func flagError(cmd *cobra.Command, err error) error {
	var invalid *pflag.InvalidValueError
	if !errors.As(err, &invalid) {
		return usageError{err}
	}
	err = shortened(err)
	formal := []string{"bool", "uint16", "duration", "level"}
	if cmd.Name() == "istio-iptables" && slices.Contains(formal, invalid.GetFlag().Value.Type()) {
		return usageError{err}
	}
	return err
}

// shortened cuts the value that pflag repeats in an error.
func shortened(err error) error {
	var invalid *pflag.InvalidValueError
	if !errors.As(err, &invalid) {
		return err
	}
	return &namedError{strings.Replace(err.Error(), strconv.Quote(invalid.GetValue()), capture.Quoted(invalid.GetValue()), 1), err}
}

func noArguments(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unexpected argument %s: values belong to flags", capture.Quoted(args[0]))}
	}
	return nil
}
